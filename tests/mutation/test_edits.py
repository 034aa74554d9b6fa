"""Every built-in edit, for real: it applies, trains, serves, and keeps the genome's contract."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from darwin_exp.individual import Genome, Reason
from darwin_exp.mutation import EDITS
from darwin_exp.mutation.builtin import CodeEdit, SettingsEdit, read_settings
from darwin_exp.protocols import EditFailed

ROOT = Path(__file__).resolve().parents[2]
V, T = 31, 16
TINY = {"n_layers": 2, "n_heads": 2, "width": 32, "batch_size": 4}
STRUCTURAL = [name for name, edit in EDITS.items() if isinstance(edit, CodeEdit)]
ON_SETTINGS = [name for name, edit in EDITS.items() if isinstance(edit, SettingsEdit)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the jobs say; models this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_settings(genome: Genome, **changed: Any) -> Genome:
    recipe = yaml.safe_load((ROOT / "conf/trainer/baseline.yaml").read_text())["settings"]
    return genome.with_files({"settings.json": json.dumps({**recipe, **changed}, indent=2) + "\n"})


@pytest.fixture(scope="module")
def base() -> Genome:
    return with_settings(Genome.from_folder(ROOT / "trainer_base"), **TINY)


@lru_cache(maxsize=512)
def edited(genome: Genome, name: str, seed: int = 0) -> Genome:
    edit = EDITS[name]
    return edit.apply(genome, edit.draw(genome, Random(seed)))


def write_job(genome: Genome, folder: Path, max_steps: int) -> Path:
    """Lay out a working directory as the sandbox does."""
    genome.write_to(folder / "code")
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    # A pattern that a model can learn, so that its training shows in the loss.
    tokens = (np.arange(4_000) * 7 % V).astype("<u2")
    tokens.tofile(folder / "in" / "train.bin")
    job = {
        "budget_seconds": 120.0,
        "max_steps": max_steps,
        "seed": 1,
        "device": "cpu",
        "threads": 1,
        "vocab_size": V,
        "context_length": T,
        "train": "in/train.bin",
        "token_bytes": 2,
        "extra_train": [],
        "out": "out",
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


@contextmanager
def code_first(code: Path) -> Iterator[None]:
    """Import from a genome's folder, and forget what was imported from it afterwards."""
    sys.modules.pop("model", None)
    sys.path.insert(0, str(code))
    argv = sys.argv
    try:
        yield
    finally:
        sys.path.remove(str(code))
        sys.modules.pop("model", None)
        sys.argv = argv


def train(genome: Genome, folder: Path, max_steps: int = 20) -> nn.Module:
    """Run train.py in this process and return the model that it left, rebuilt from its files."""
    job = write_job(genome, folder, max_steps)
    with code_first(folder / "code"):
        sys.argv = ["train.py", str(job)]
        runpy.run_path(str(folder / "code" / "train.py"), run_name="__main__")
    return rebuilt(folder)


def rebuilt(folder: Path) -> nn.Module:
    arguments = json.loads((folder / "out" / "model.json").read_text())
    with code_first(folder / "code"):
        build_model = runpy.run_path(str(folder / "code" / "model.py"))["build_model"]
    model = build_model(arguments)
    assert isinstance(model, nn.Module)
    model.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    return model.eval()


def losses(folder: Path) -> list[float]:
    lines = (folder / "out" / "progress.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_keeps_the_contract(model: nn.Module, folder: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(V, (3, T), generator=generator)
    with torch.inference_mode():
        logits = model(tokens)
        assert logits.shape == (3, T, V)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        for cut in (1, 2, 7, T - 1):
            prefix = model(tokens[:, :cut])
            assert prefix.shape == (3, cut, V)
            torch.testing.assert_close(prefix, logits[:, :cut], atol=2e-4, rtol=1e-3)
            other = tokens.clone()
            other[:, cut:] = (other[:, cut:] + 1) % V
            torch.testing.assert_close(model(other)[:, :cut], logits[:, :cut], atol=2e-4, rtol=1e-3)
            assert not torch.equal(model(other)[:, cut:], logits[:, cut:])
        torch.testing.assert_close(rebuilt(folder)(tokens), logits, atol=0, rtol=0)
    # The harness times a backward pass after serving: nothing may be left in inference mode.
    model(tokens).sum().backward()


def assert_parses(genome: Genome) -> None:
    for path, text in genome.files:
        ast.parse(text) if path.endswith(".py") else json.loads(text)


def test_the_base_itself_keeps_the_contract(base: Genome, tmp_path: Path) -> None:
    assert_keeps_the_contract(train(base, tmp_path), tmp_path)


def test_the_library_holds_edits_of_several_kinds() -> None:
    assert len(STRUCTURAL) >= 8
    assert len(ON_SETTINGS) >= 8
    assert {EDITS[name].file for name in EDITS} == {"settings.json", "model.py", "train.py"}
    for name, edit in EDITS.items():
        assert name == edit.name
        for words in (edit.about, edit.title, edit.why, edit.hope):
            assert words
            assert "\n" not in words


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_alone_trains_and_serves(base: Genome, name: str, tmp_path: Path) -> None:
    child = edited(base, name, seed=1)
    assert_parses(child)
    assert child.fingerprint != base.fingerprint
    assert_keeps_the_contract(train(child, tmp_path), tmp_path)
    assert all(loss == loss for loss in losses(tmp_path))


@pytest.mark.parametrize("seed", range(5))
def test_drawn_pairs_train_and_serve(base: Genome, seed: int, tmp_path: Path) -> None:
    first, second = Random(seed).sample([n for n in EDITS if n not in ON_SETTINGS], 2)
    child = edited(edited(base, first, seed), second, seed)
    assert_parses(child)
    assert_keeps_the_contract(train(child, tmp_path), tmp_path)


@pytest.mark.parametrize("seed", range(2))
def test_all_structural_edits_compose_in_any_order(base: Genome, seed: int, tmp_path: Path) -> None:
    names = Random(seed).sample(STRUCTURAL, len(STRUCTURAL))
    child = base
    for name in names:
        child = edited(child, name, seed)
    assert_keeps_the_contract(train(child, tmp_path), tmp_path)


def test_a_composition_trains_by_itself_in_a_fresh_process(base: Genome, tmp_path: Path) -> None:
    child = base
    for name in ("rotary", "muon", "untied_head", "squared_relu", "trapezoid", "higher_rate"):
        child = edited(child, name)
    job = write_job(child, tmp_path, max_steps=40)
    done = subprocess.run(
        [sys.executable, "-W", "error", "code/train.py", str(job)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_keeps_the_contract(rebuilt(tmp_path), tmp_path)
    reported = losses(tmp_path)
    assert reported[-1] < 0.8 * reported[0]


@pytest.mark.parametrize("name", STRUCTURAL)
def test_a_structural_edit_does_not_apply_twice(base: Genome, name: str) -> None:
    once = edited(base, name)
    with pytest.raises(EditFailed) as refusal:
        edited(once, name)
    assert refusal.value.reason is Reason.DOES_NOT_APPLY


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_says_so_when_the_code_is_beyond_recognition(name: str) -> None:
    strange = Genome.of({"train.py": "print()\n", "model.py": "x = 1\n", "settings.json": "{}\n"})
    with pytest.raises(EditFailed):
        edited(strange, name)
    broken = Genome.of({"train.py": "def (", "model.py": "class", "settings.json": "{"})
    with pytest.raises(EditFailed):
        edited(broken, name)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_its_own_file_and_nothing_else(base: Genome, name: str) -> None:
    child = edited(base, name)
    changed = {path for path, text in child.files if base.as_dict.get(path) != text}
    assert changed == {EDITS[name].file}
    if name in ON_SETTINGS:
        assert read_settings(child).keys() == read_settings(base).keys()


@pytest.mark.parametrize("name", STRUCTURAL)
def test_a_structural_edit_keeps_the_comments_it_does_not_replace(base: Genome, name: str) -> None:
    file = EDITS[name].file
    before, after = base.as_dict[file], edited(base, name).as_dict[file]
    comments = [line.split("# ", 1)[1] for line in before.splitlines() if "# " in line]
    lost = [comment for comment in comments if comment not in after]
    # Comments go only with the lines that they stand on.
    assert len(lost) <= 2, lost


@pytest.mark.parametrize("name", EDITS)
def test_drawing_depends_on_the_random_numbers_alone(base: Genome, name: str) -> None:
    edit = EDITS[name]
    assert edit.draw(base, Random(5)) == edit.draw(base, Random(5))
    parameters = edit.draw(base, Random(5))
    assert json.loads(json.dumps(parameters)) == parameters
    assert edit.apply(base, parameters) == edited(base, name, 5)
    assert "\n" not in edit.describe(base, parameters)


def test_a_description_names_the_old_value_and_the_new(base: Genome) -> None:
    told = EDITS["higher_rate"].describe(with_settings(base, learning_rate=0.004), {"factor": 1.5})
    assert told == "higher peak rate (learning_rate 0.004 -> 0.006)"


def test_rates_stop_short_of_absurd_values(base: Genome) -> None:
    with pytest.raises(EditFailed, match="too far"):
        EDITS["higher_rate"].apply(with_settings(base, learning_rate=0.04), {"factor": 2.0})


@pytest.mark.parametrize("layers", [2, 3, 4, 6, 12])
def test_depth_and_width_are_traded_at_about_equal_size(base: Genome, layers: int) -> None:
    before = {"n_layers": layers, "n_heads": 6, "width": 192}
    for name in ("shallower_wider", "deeper_narrower"):
        after = read_settings(edited(with_settings(base, **before), name))
        ratio = after["n_layers"] * after["width"] ** 2 / (layers * 192**2)
        assert 0.6 < ratio < 1.5
        assert after["width"] % after["n_heads"] == 0


def test_zeroed_projections_leave_the_first_logits_to_the_embedding(
    base: Genome, tmp_path: Path
) -> None:
    child = edited(base, "zero_projections")
    child.write_to(tmp_path)
    with code_first(tmp_path):
        module = runpy.run_path(str(tmp_path / "model.py"))
    settings = read_settings(child)
    names = module["GPTConfig"].__dataclass_fields__
    arguments = {**settings, "vocab_size": V, "context_length": T}
    model = module["build_model"]({k: v for k, v in arguments.items() if k in names})
    x = torch.randn(2, T, settings["width"])
    for block in model.blocks:
        torch.testing.assert_close(block(x), x, atol=0, rtol=0)


# A model as somebody else might have written it: other names, modules instead of functions,
# annotated results, nothing of torch.nn.functional imported.
FOREIGN = '''
"""Somebody else's GPT."""
import torch
import torch.nn as nn


class Attend(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.h = heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, h):
        b, t, c = h.shape
        split = lambda z: z.view(b, t, self.h, c // self.h).transpose(1, 2)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            split(self.wq(h)),  # queries
            value=split(self.wv(h)),
            key=split(self.wk(h)),
            is_causal=True,
        )
        return self.out(mixed.transpose(1, 2).reshape(b, t, c))


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, h):
        return self.down(self.act(self.up(h)))


class Layer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.n1 = nn.LayerNorm(dim)
        self.n2 = nn.LayerNorm(dim)
        self.attend = Attend(dim, heads)
        self.ff = FeedForward(dim)

    def forward(self, h):
        h = h + self.attend(self.n1(h))
        return h + self.ff(self.n2(h))


class Net(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.wte = nn.Embedding(a["vocab_size"], a["width"])
        self.wpe = nn.Embedding(a["context_length"], a["width"])
        self.layers = nn.ModuleList(Layer(a["width"], a["n_heads"]) for _ in range(a["n_layers"]))
        self.ln = nn.LayerNorm(a["width"])
        self.lm_head = nn.Linear(a["width"], a["vocab_size"], bias=False)

    def forward(self, idx):
        pos = torch.arange(idx.shape[1], device=idx.device)
        h = self.wpe(pos) + self.wte(idx)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(self.ln(h))


def build_model(arguments):
    return Net(arguments)
'''
MODEL_EDITS = [name for name in STRUCTURAL if EDITS[name].file == "model.py"]


def test_structural_edits_fit_a_model_that_somebody_else_wrote(
    base: Genome, tmp_path: Path
) -> None:
    child = base.with_files({"model.py": FOREIGN})
    for name in Random(0).sample(MODEL_EDITS, len(MODEL_EDITS)):
        child = edited(child, name)
    assert_keeps_the_contract(train(child, tmp_path), tmp_path)
    assert "# queries" in child.as_dict["model.py"]
    assert "self.wpe" not in child.as_dict["model.py"]


def test_structural_edits_survive_renaming(base: Genome, tmp_path: Path) -> None:
    child = base.with_files(
        {
            file: re.sub(
                r"\b(projection|expand|query_key_value|token_embedding|position_embedding|MLP|"
                r"CausalSelfAttention|decayed|lowest|groups|build_optimizer|positions|GPT)\b",
                r"\1_1",
                base.as_dict[file],
            )
            for file in ("model.py", "train.py")
        }
    )
    for name in STRUCTURAL:
        child = edited(child, name)
    assert_keeps_the_contract(train(child, tmp_path), tmp_path)


@pytest.mark.parametrize("name", [n for n in STRUCTURAL if EDITS[n].file == "train.py"])
def test_training_edits_leave_seed_and_job_alone(base: Genome, name: str) -> None:
    text = edited(base, name).as_dict["train.py"]
    for line in base.as_dict["train.py"].splitlines():
        if "seed" in line or 'job["' in line:
            assert line in text
