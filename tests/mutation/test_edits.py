"""Every built-in edit, for real: it applies, trains, serves, and keeps the genome's contract."""

from __future__ import annotations

import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from darwin_exp.individual import Genome, Reason
from darwin_exp.mutation import EDITS
from darwin_exp.mutation.builtin import read_settings
from darwin_exp.protocols import EditFailed
from tests.mutation.edited import (
    EXCLUSIVE,
    ON_SETTINGS,
    ON_TRAINING,
    PAIRS,
    STRUCTURAL,
    V,
    assert_keeps_the_contract,
    assert_parses,
    base_genome,
    edited,
    lay_out_genome,
    one_of_each_kind,
    train,
    trained,
    with_settings,
)
from tests.tiny_run import T, code_first, progress_of, rebuilt


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the jobs say; models this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base() -> Genome:
    return base_genome()


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in progress_of(folder)]


def test_the_base_itself_keeps_the_contract(base: Genome, tmp_path: Path) -> None:
    assert_keeps_the_contract(trained(base, tmp_path), tmp_path)


def test_the_library_holds_edits_of_several_kinds() -> None:
    assert len(STRUCTURAL) >= 20
    assert len(ON_SETTINGS) >= 12
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
    assert_keeps_the_contract(trained(child, tmp_path), tmp_path)
    assert all(loss == loss for loss in losses(tmp_path))


@pytest.mark.parametrize(("first", "second"), Random(11).sample(PAIRS, 40))
def test_drawn_pairs_train_and_serve(base: Genome, first: str, second: str, tmp_path: Path) -> None:
    child = edited(edited(base, first, seed=2), second, seed=2)
    assert_parses(child)
    assert_keeps_the_contract(trained(child, tmp_path), tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_structural_edits_of_all_kinds_compose_in_any_order(
    base: Genome, seed: int, tmp_path: Path
) -> None:
    child = base
    for name in one_of_each_kind(STRUCTURAL, Random(seed)):
        child = edited(child, name, seed)
    assert_keeps_the_contract(trained(child, tmp_path), tmp_path)


def test_edits_of_all_kinds_keep_to_the_clock(
    base: Genome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = base
    for library in (STRUCTURAL, ON_SETTINGS):
        for name in one_of_each_kind(library, Random(0)):
            child = edited(child, name, seed=0)
    # Every look at this clock takes a while, so that a busy machine makes no difference.
    looks, replace = itertools.count(), os.replace
    saves: list[tuple[float, set[str]]] = []

    def note(source: Path, target: Path) -> None:
        replace(source, target)
        if target.name == "model.safetensors":
            saves.append((time.monotonic(), set(load_file(target))))

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: 0.08 * next(looks))
        patch.setattr(os, "replace", note)
        names = train(child, tmp_path, max_steps=None, budget_seconds=4.0)
    (early, first), *_, (late, last) = saves
    assert early - names["started"] < 1.0
    assert late - names["started"] <= 4.0
    assert first == last
    assert names["step"] > 10
    assert names["progress"] > 0.9
    assert_keeps_the_contract(rebuilt(tmp_path), tmp_path)


def test_a_composition_trains_by_itself_in_a_fresh_process(base: Genome, tmp_path: Path) -> None:
    child = base
    for name in ("rotary", "muon", "untied_head", "squared_relu", "trapezoid", "higher_rate"):
        child = edited(child, name)
    job = lay_out_genome(child, tmp_path, max_steps=40)
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


@pytest.mark.parametrize(
    ("first", "second"), [p for e in EXCLUSIVE for p in permutations(sorted(e))]
)
def test_what_would_undo_another_edit_is_refused(base: Genome, first: str, second: str) -> None:
    with pytest.raises(EditFailed) as refusal:
        edited(edited(base, first), second)
    assert refusal.value.reason is Reason.DOES_NOT_APPLY


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


@given(name=st.sampled_from(sorted(EDITS)), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=100)
def test_drawing_depends_on_the_random_numbers_alone(name: str, seed: int) -> None:
    edit, base = EDITS[name], base_genome()
    parameters = edit.draw(base, Random(seed))
    assert edit.draw(base, Random(seed)) == parameters
    assert json.loads(json.dumps(parameters)) == parameters
    assert edit.recorded(parameters).parameters == parameters


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
        assert 0.8 <= ratio <= 1.2
        assert after["width"] % (2 * after["n_heads"]) == 0
        assert (after["width"] > 192) == (after["n_layers"] < layers)


def test_depth_and_width_are_not_traded_where_the_size_would_change(base: Genome) -> None:
    with pytest.raises(EditFailed, match="no width near 3"):
        edited(with_settings(base, n_layers=1, n_heads=1, width=4), "deeper_narrower")


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
    for name in one_of_each_kind(MODEL_EDITS, Random(0)):
        child = edited(child, name)
    assert_keeps_the_contract(trained(child, tmp_path), tmp_path)
    assert "# queries" in child.as_dict["model.py"]
    assert "self.wpe" not in child.as_dict["model.py"]


def test_an_edit_stays_apart_from_operators_beside_it(base: Genome, tmp_path: Path) -> None:
    text = FOREIGN.replace("self.wte(idx)", "self.wte(idx) * 8.0")
    child = edited(base.with_files({"model.py": text}), "bigram_embedding")
    child.write_to(tmp_path)
    with code_first(tmp_path):
        module = runpy.run_path(str(tmp_path / "model.py"))
    settings = read_settings(child)
    model: Any = module["build_model"]({**settings, "vocab_size": V, "context_length": T})
    torch.nn.init.ones_(model.bigram_embedding.weight)
    torch.nn.init.zeros_(model.wpe.weight)
    read: list[torch.Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: read.append(*inputs))
    tokens = torch.arange(T)[None]
    model(tokens)
    torch.testing.assert_close(read[0], (model.wte(tokens) + 1.0) * 8.0)


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
    for name in one_of_each_kind(STRUCTURAL, Random(1)):
        child = edited(child, name)
    assert_keeps_the_contract(trained(child, tmp_path), tmp_path)


@pytest.mark.parametrize("name", ON_TRAINING)
def test_training_edits_leave_seed_and_job_alone(base: Genome, name: str) -> None:
    text = edited(base, name).as_dict["train.py"]
    for line in base.as_dict["train.py"].splitlines():
        if "seed" in line or 'job["' in line:
            assert line in text
