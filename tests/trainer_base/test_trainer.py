"""The seed genome keeps its own contract: what it reads, what it leaves behind, and when."""

# mypy: allow-untyped-calls

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from darwin_exp.individual import Genome
from tests.tiny_run import ROOT, T, lay_out, progress_of, rebuilt, run_train

TRAINERS = sorted(path.stem for path in (ROOT / "conf" / "trainer").glob("*.yaml"))
V, B = 61, 4  # token ids, batch: odd enough to show a padded head

TINY: dict[str, Any] = {
    "n_layers": 2,
    "n_heads": 2,
    "width": 32,
    "dropout": 0.0,
    "bias": False,
    "tied_head": True,
    "batch_size": B,
    "accumulation_steps": 1,
    "learning_rate": 1e-2,
    "final_rate_fraction": 0.1,
    "warmup_fraction": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "gradient_clip": 1.0,
    "precision": "float32",
    "compile": False,
}
OTHER: dict[str, Any] = {
    "n_layers": 1,
    "n_heads": 1,
    "width": 48,
    "dropout": 0.5,
    "bias": True,
    "tied_head": False,
    "batch_size": 3,
    "accumulation_steps": 2,
    "learning_rate": 2e-2,
    "final_rate_fraction": 0.9,
    "warmup_fraction": 0.9,
    "beta1": 0.5,
    "beta2": 0.9,
    "weight_decay": 10.0,
    "gradient_clip": 1e-3,
    "precision": "bfloat16",
}


@dataclass(frozen=True)
class Trained:
    """What a run of train.py left in its output folder, and the names it defined."""

    out: Path
    names: Mapping[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.out / "model.safetensors")

    @property
    def progress(self) -> list[dict[str, Any]]:
        return progress_of(self.out.parent)

    def rebuilt(self) -> nn.Module:
        """Build the model from what was left behind, as the harness does."""
        return rebuilt(self.out.parent, self.names)


def prepare(folder: Path, changes: Mapping[str, Any], job_changes: Mapping[str, Any]) -> Path:
    """Write the base genome, a text that repeats itself, and a job; return the job's path."""
    settings = json.dumps({**TINY, **changes})
    base = Genome.from_folder(ROOT / "trainer_base").with_files({"settings.json": settings})
    return lay_out(base, folder, np.arange(4000) % V, V, **job_changes)


def run(job: Path) -> Trained:
    """Run train.py as the launcher does."""
    return Trained(job.parent / "out", run_train(job))


Train = Callable[..., Trained]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Train the base genome; keywords are settings, `job` changes the job."""
    runs = 0

    def train_once(job: Mapping[str, Any] | None = None, **changes: Any) -> Trained:
        nonlocal runs
        runs += 1
        return run(prepare(tmp_path / str(runs), changes, job or {}))

    return train_once


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One run of 20 steps that several tests look at, and none changes."""
    return run(prepare(tmp_path_factory.mktemp("finished") / "run", {}, {}))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two sets of weights are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- seeds and settings ---------------------------------------------------------------------------


def test_the_same_seed_trains_the_same_weights_bit_for_bit(train: Train, finished: Trained) -> None:
    assert same(train().weights, finished.weights)


def test_another_seed_trains_other_weights(train: Train, finished: Trained) -> None:
    assert not same(train(job={"seed": 2}).weights, finished.weights)


@pytest.mark.parametrize("name", sorted(OTHER))
def test_every_setting_changes_what_is_trained(train: Train, finished: Trained, name: str) -> None:
    assert not same(train(**{name: OTHER[name]}).weights, finished.weights)


def test_nothing_is_compiled_without_a_gpu(train: Train, finished: Trained) -> None:
    trained = train(compile=True)
    assert trained.names["network"] is trained.names["model"]
    assert same(trained.weights, finished.weights)


@pytest.mark.parametrize("name", sorted(TINY))
def test_a_missing_setting_is_named(tmp_path: Path, name: str) -> None:
    job = prepare(tmp_path / "run", {}, {})
    left = {key: value for key, value in TINY.items() if key != name}
    (tmp_path / "run" / "code" / "settings.json").write_text(json.dumps(left))
    with pytest.raises(SystemExit) as error:
        run(job)
    assert str(error.value) == f"settings.json: missing {name}"


def test_an_unknown_setting_is_named(train: Train) -> None:
    with pytest.raises(SystemExit, match="no setting depth"):
        train(depth=3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainer_in_conf_gives_each_setting_that_train_py_reads(trainer: str) -> None:
    loaded: Any = OmegaConf.load(ROOT / "conf" / "trainer" / f"{trainer}.yaml")
    assert set(loaded.settings) == set(TINY)
    for name, value in loaded.settings.items():
        assert type(value) is type(TINY[name]), name


@pytest.mark.parametrize(
    ("trainer", "vocab_size", "millions"),
    [("nanogpt_cpu", 65, 0.80), ("char_384", 65, 10.7), ("gpt2_124m", 50257, 124.3)],
)
def test_the_published_models_have_their_published_sizes(
    finished: Trained, trainer: str, vocab_size: int, millions: float
) -> None:
    loaded: Any = OmegaConf.load(ROOT / "conf" / "trainer" / f"{trainer}.yaml")
    sizes = {name: loaded.settings[name] for name in finished.names["arguments"] if name in TINY}
    sizes |= {"vocab_size": vocab_size, "context_length": loaded.context_length}
    with torch.device("meta"):
        model = finished.names["build_model"](sizes)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


# --- what is read ---------------------------------------------------------------------------------


def test_extra_training_files_are_joined_to_the_first(tmp_path: Path) -> None:
    job = prepare(tmp_path / "run", {}, {"extra_train": ["in/a.bin", "in/b.bin"], "max_steps": 1})
    for name, token in (("train", 1), ("a", 2), ("b", 3)):
        np.full(100, token, dtype="<u2").tofile(job.parent / "in" / f"{name}.bin")
    trained = run(job)
    assert trained.names["tokens"].tolist() == [1] * 100 + [2] * 100 + [3] * 100
    drawn = torch.cat([trained.names["next_batch"]()[0] for _ in range(20)])
    assert set(drawn.flatten().tolist()) == {1, 2, 3}


def test_tokens_of_four_bytes_train_the_same_as_tokens_of_two(
    tmp_path: Path, finished: Trained
) -> None:
    job = prepare(tmp_path / "run", {}, {"token_bytes": 4})
    (np.arange(4000) % V).astype("<u4").tofile(job.parent / "in" / "train.bin")
    assert same(run(job).weights, finished.weights)


def test_targets_are_the_inputs_one_token_later(finished: Trained) -> None:
    inputs, targets = finished.names["next_batch"]()
    assert inputs.shape == targets.shape == (B, T)
    assert torch.equal((inputs + 1) % V, targets)  # the text counts up


def test_a_text_shorter_than_a_window_is_refused_in_one_line(tmp_path: Path) -> None:
    job = prepare(tmp_path / "run", {}, {})
    np.zeros(T, dtype="<u2").tofile(job.parent / "in" / "train.bin")
    with pytest.raises(SystemExit, match="train: 16 tokens, but one window takes 17"):
        run(job)


# --- what is left behind, and when ----------------------------------------------------------------


def test_the_rebuilt_model_gives_the_trained_models_logits(finished: Trained) -> None:
    tokens = torch.randint(V, (3, T))
    with torch.inference_mode():
        assert torch.equal(finished.rebuilt()(tokens), finished.names["model"].eval()(tokens))


def test_a_tied_head_is_stored_once(train: Train, finished: Trained) -> None:
    assert "head.weight" not in finished.weights
    assert train(tied_head=False, job={"max_steps": 1}).weights["head.weight"].shape == (V, 32)


def test_progress_ends_with_the_last_step_and_counts_tokens_exactly(train: Train) -> None:
    progress = train(accumulation_steps=3, job={"max_steps": 7}).progress
    assert [line["step"] for line in progress] == sorted({line["step"] for line in progress})
    assert progress[-1]["step"] == 7
    assert all(line["tokens"] == line["step"] * 3 * B * T for line in progress)


def test_training_lowers_the_loss(finished: Trained) -> None:
    assert finished.progress[-1]["loss"] < 0.7 * math.log(V)


def test_a_run_that_diverges_keeps_what_it_has_and_claims_no_loss(train: Train) -> None:
    trained = train(learning_rate=1e30)
    assert trained.progress[-1]["loss"] is None
    assert trained.progress[-1]["step"] == 20
    assert not all(weight.isfinite().all() for weight in trained.weights.values())


@pytest.mark.usefixtures("finished")  # torch's own late imports, which the launcher makes early
def test_a_run_on_the_clock_ends_by_itself_within_its_budget(train: Train) -> None:
    started = time.monotonic()
    trained = train(job={"max_steps": None, "budget_seconds": 2.0})
    seconds = time.monotonic() - started
    assert 1.5 < seconds < 2.0
    assert trained.names["progress"] == pytest.approx(1.0, abs=0.1)
    assert same(trained.weights, trained.names["model"].state_dict())
    assert trained.progress[-1]["step"] == trained.names["step"] > 50
    assert len(trained.progress) < 40
    assert {path.name for path in trained.out.iterdir()} == {
        "model.json",
        "model.safetensors",
        "progress.jsonl",
    }


def test_a_run_killed_half_way_leaves_an_early_checkpoint_that_is_complete(
    tmp_path: Path, finished: Trained
) -> None:
    job = prepare(tmp_path / "run", {}, {"max_steps": None, "budget_seconds": 10.0})
    command = [sys.executable, str(job.parent / "code" / "train.py"), str(job)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60.0
        while not (job.parent / "out" / "model.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    logits = Trained(job.parent / "out", finished.names).rebuilt()(torch.randint(V, (1, T)))
    assert logits.isfinite().all()


# --- model, optimizer, schedule -------------------------------------------------------------------


def test_the_model_never_looks_ahead(finished: Trained) -> None:
    model = finished.rebuilt()
    tokens = torch.randint(V, (2, T))
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % V
    with torch.inference_mode():
        full, other, prefix = model(tokens), model(changed), model(tokens[:, :9])
    torch.testing.assert_close(full[:, :9], other[:, :9])
    torch.testing.assert_close(full[:, :9], prefix)
    assert not torch.allclose(full[:, 9:], other[:, 9:], atol=0.1)


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("length", [1, 5, T])
def test_an_untrained_model_knows_nothing(finished: Trained, tied_head: bool, length: int) -> None:
    torch.manual_seed(0)
    arguments = {**finished.names["arguments"], "tied_head": tied_head}
    model = finished.names["build_model"](arguments)
    tokens = torch.randint(V, (200, length))
    logits = model(tokens)
    assert logits.shape == (200, length, V)
    targets = torch.randint(V, (200, length))
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=0.1)


def test_only_matrices_decay(finished: Trained) -> None:
    groups = finished.names["optimizer"].param_groups
    decaying = [p for group in groups if group["weight_decay"] for p in group["params"]]
    resting = [p for group in groups if not group["weight_decay"] for p in group["params"]]
    assert {p.dim() for p in decaying} == {2}
    assert {p.dim() for p in resting} == {1}
    assert len(decaying) + len(resting) == len(list(finished.names["model"].parameters()))


@given(early=st.floats(0.0, 1.0), late=st.floats(0.0, 1.0))
@settings(deadline=None)
def test_the_rate_rises_through_the_warm_up_and_then_only_falls(
    finished: Trained, early: float, late: float
) -> None:
    early, late = sorted((early, late))
    rate = finished.names["learning_rate"]
    peak, warmup = TINY["learning_rate"], TINY["warmup_fraction"]
    assert 0.0 <= rate(early) <= peak * (1 + 1e-12)
    if late < warmup:
        assert rate(early) <= rate(late)
    elif early >= warmup:
        assert rate(early) >= rate(late) - 1e-12
    assert rate(warmup) == pytest.approx(peak)
    assert rate(1.0) == pytest.approx(peak * TINY["final_rate_fraction"])
