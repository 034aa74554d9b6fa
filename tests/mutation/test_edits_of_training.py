"""What each edit of the training loop does to training, on the base's own loop."""

# mypy: allow-untyped-calls

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from darwin_exp.individual import Genome
from darwin_exp.mutation import EDITS
from darwin_exp.mutation.builtin import read_settings
from tests.mutation.edited import (
    TINY,
    V,
    base_genome,
    edited,
    train,
    with_settings,
)
from tests.tiny_run import T, progress_of

HIDDEN = 4 * TINY["width"]  # the outputs of an MLP's first layer, were there as many tokens


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the jobs say."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base() -> Genome:
    return base_genome()


def after(genome: Genome, name: str, **parameters: Any) -> Genome:
    return EDITS[name].apply(genome, parameters)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "out" / "model.safetensors")


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@contextmanager
def seen_by_models() -> Iterator[list[tuple[int, ...]]]:
    """Collect the shapes of all token batches that go through a model."""
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: Any) -> None:
        if type(module).__name__ == "GPT":
            shapes.append(tuple(inputs[0].shape))

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield shapes
    finally:
        hook.remove()


# --- batches --------------------------------------------------------------------------------------

STAGED: list[list[tuple[str, dict[str, Any]]]] = [
    [("context_warm_up", {"divisor": 4, "until": 0.4})],
    [("batch_warm_up", {"divisor": 4, "until": 0.4})],
    [
        ("batch_warm_up", {"divisor": 2, "until": 0.4}),
        ("accumulation", {"factor": 2, "same_tokens": False}),
        ("prefetch", {}),
        ("context_warm_up", {"divisor": 2, "until": 0.2}),
    ],
    [("accumulation", {"factor": 2, "same_tokens": True}), ("data_order", {})],
]


@pytest.mark.parametrize("edits", STAGED)
def test_tokens_are_counted_exactly_whatever_the_batches(
    base: Genome, edits: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    child = base
    for name, parameters in edits:
        child = after(child, name, **parameters)
    with seen_by_models() as shapes:
        train(child, tmp_path)
    seen = [0, *itertools.accumulate(B * length for B, length in shapes)]
    steps = read_settings(child)["accumulation_steps"]
    for line in progress_of(tmp_path):
        assert line["tokens"] == seen[line["step"] * steps]
    assert len(shapes) == 20 * steps


def test_contexts_grow_to_the_full_length_at_the_same_count_of_tokens(
    base: Genome, tmp_path: Path
) -> None:
    with seen_by_models() as shapes:
        train(after(base, "context_warm_up", divisor=4, until=0.4), tmp_path)
    assert [shape for shape, _ in itertools.groupby(shapes)] == [(16, 4), (8, 8), (4, 16)]


def test_batches_grow_to_the_full_size(base: Genome, tmp_path: Path) -> None:
    with seen_by_models() as shapes:
        train(after(base, "batch_warm_up", divisor=4, until=0.4), tmp_path)
    assert [shape for shape, _ in itertools.groupby(shapes)] == [(1, T), (2, T), (4, T)]


@given(high=st.integers(1, 400), n=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_shuffled_windows_cover_the_text_once_before_any_comes_again(
    next_starts: Any, high: int, n: int, seed: int
) -> None:
    names = next_starts.__globals__
    names["starts_left"] = torch.empty(0, dtype=torch.long)
    torch.manual_seed(seed)
    drawn: list[int] = []
    while not drawn or len(names["starts_left"]):
        starts = next_starts(high, (n, 1))
        assert starts.shape == (n, 1)
        drawn += starts.flatten().tolist()
        if len(drawn) > 40 * 400:
            break
    assert all(0 <= start < high for start in drawn)
    first = drawn[: math.ceil(high / T) - 1]
    assert len(set(first)) == len(first)
    assert len({start % T for start in first}) <= 1


@pytest.fixture(scope="module")
def next_starts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("order") / "run"
    return train(edited(base_genome(), "data_order"), folder, max_steps=1)["next_starts"]


def test_batches_drawn_ahead_are_the_same_in_every_run(base: Genome, tmp_path: Path) -> None:
    # Dropout draws random numbers while the thread does.
    child = edited(edited(with_settings(base, **_tiny(dropout=0.3)), "data_order"), "prefetch")
    train(child, tmp_path / "one")
    train(child, tmp_path / "other")
    assert same(weights(tmp_path / "one"), weights(tmp_path / "other"))


def _tiny(**changed: Any) -> dict[str, Any]:
    return {**read_settings(base_genome()), **changed}


# --- the optimizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("vocab_size", [V, HIDDEN])
def test_embeddings_and_head_do_not_decay(
    base: Genome, tied_head: bool, vocab_size: int, tmp_path: Path
) -> None:
    child = with_settings(base, **_tiny(tied_head=tied_head))
    child = after(child, "decay_groups", decaying="hidden matrices")
    names = train(child, tmp_path, max_steps=1, vocab_size=vocab_size)
    decaying = {
        id(p) for g in names["optimizer"].param_groups if g["weight_decay"] for p in g["params"]
    }
    for name, parameter in names["model"].named_parameters():
        hidden = name.startswith("blocks") and parameter.dim() == 2
        assert (id(parameter) in decaying) == hidden, name


@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("vocab_size", [V, HIDDEN])
def test_muon_moves_all_hidden_matrices_and_no_others(
    base: Genome, tied_head: bool, vocab_size: int, tmp_path: Path
) -> None:
    child = edited(with_settings(base, **_tiny(tied_head=tied_head)), "muon")
    names = train(child, tmp_path, max_steps=1, vocab_size=vocab_size)
    moved = {id(weight) for stack in names["optimizer"].stacks.values() for weight in stack}
    for name, parameter in names["model"].named_parameters():
        hidden = name.startswith("blocks") and parameter.dim() == 2
        assert (id(parameter) in moved) == hidden, name


def test_a_head_is_found_beside_or_around_the_embedding(base: Genome, tmp_path: Path) -> None:
    names = train(edited(base, "muon"), tmp_path, max_steps=1)
    hidden = nn.ModuleList([nn.Linear(12, 48), nn.Linear(48, 12)])
    tables = nn.ModuleDict({"places": nn.Embedding(16, 12), "tokens": nn.Embedding(48, 12)})
    net = nn.ModuleDict(
        {
            "trunk": nn.ModuleDict({**tables, "hidden": hidden}),
            "head": nn.Linear(12, 48),
        }
    )
    found = {id(weight) for weight in names["tables_of"](net)}
    expected = (tables["places"], tables["tokens"], net["head"])
    assert found == {id(module.weight) for module in expected}


def test_everything_decays(base: Genome, tmp_path: Path) -> None:
    names = train(after(base, "decay_groups", decaying="everything"), tmp_path, max_steps=1)
    assert {group["weight_decay"] for group in names["optimizer"].param_groups} == {0.1}


@pytest.mark.parametrize("optimizer", [None, "muon", "lion"])
@pytest.mark.parametrize("other_first", [True, False])
def test_embeddings_have_a_rate_of_their_own(
    base: Genome, optimizer: str | None, other_first: bool, tmp_path: Path
) -> None:
    child = edited(base, optimizer) if optimizer and other_first else base
    child = after(child, "decay_groups", decaying="hidden matrices")
    child = after(child, "embedding_rate", factor=3.0)
    child = edited(child, optimizer) if optimizer and not other_first else child
    names = train(child, tmp_path, max_steps=3)
    groups = names["optimizer"].param_groups
    assert sum(len(group["params"]) for group in groups) == len(names["parameters"])
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in names["model"].named_parameters():
        factor = 3.0 if "embedding" in name else 1.0
        assert rates[id(parameter)] == pytest.approx(factor * names["rate"])


@pytest.mark.parametrize("optimizer", [None, "muon", "lion"])
def test_no_weight_moves_against_its_gradient(
    base: Genome, optimizer: str | None, tmp_path: Path
) -> None:
    child = edited(edited(base, optimizer) if optimizer else base, "cautious")
    names = train(child, tmp_path)
    model, caution = names["model"], names["caution"]
    names["loss_of"](model(names["inputs"]), names["targets"]).backward()
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [p.grad.clone() for p in model.parameters()]
    caution.remember()
    names["optimizer"].step()
    caution.correct()
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    assert any(move.abs().max() > 0 for move in moved)
    for move, gradient in zip(moved, gradients, strict=True):
        # Weights are restored by an addition, which rounds.
        assert ((move * gradient) <= 1e-9).all()


def test_lion_moves_all_weights_equally_far(base: Genome, tmp_path: Path) -> None:
    child = after(with_settings(base, **_tiny(weight_decay=0.0)), "lion", scale=0.1)
    names = train(child, tmp_path, max_steps=5)
    weight = names["model"].blocks[0].mlp.expand.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    names["optimizer"].step()
    rate = names["rate"]
    torch.testing.assert_close((weight - before).abs(), torch.full_like(weight, 0.1 * rate))


@pytest.mark.parametrize("each", ["step", "tensor"])
def test_gradients_get_one_length_be_they_longer_or_shorter(
    base: Genome, each: str, tmp_path: Path
) -> None:
    names = train(after(base, "gradient_normalisation", each=each), tmp_path, max_steps=1)
    for size in (1e-3, 1e3):
        weights = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5))]
        for weight in weights:
            weight.grad = torch.randn_like(weight) * size
        names["normalise_gradients"](weights, 2.0)
        norms = [float(w.grad.norm()) for w in weights if w.grad is not None]
        if each == "step":
            assert math.hypot(*norms) == pytest.approx(2.0, rel=1e-2)
        else:
            assert norms == pytest.approx([2.0, 2.0], rel=1e-2)


def test_the_hosts_part_changes_no_result(base: Genome, tmp_path: Path) -> None:
    # A tight clip, so that every gradient is shortened.
    tight = with_settings(base, **_tiny(gradient_clip=0.01))
    train(tight, tmp_path / "one")
    train(edited(tight, "fewer_host_syncs"), tmp_path / "other")
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-4, rtol=1e-3)


def test_epsilon_reaches_the_optimizer(base: Genome, tmp_path: Path) -> None:
    names = train(edited(after(base, "adamw_eps", eps=1e-5), "muon"), tmp_path, max_steps=1)
    assert {group["eps"] for group in names["optimizer"].param_groups} == {1e-5}


# --- loss, schedule, what is saved ----------------------------------------------------------------


def test_z_loss_pulls_the_normaliser(base: Genome, tmp_path: Path) -> None:
    names = train(after(base, "z_loss", weight=1e-3), tmp_path, max_steps=1)
    logits, targets = torch.randn(2, T, V), torch.randint(V, (2, T))
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected = plain + 1e-3 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(names["loss_of"](logits, targets), expected)


@pytest.mark.parametrize("name", ["trapezoid", "sqrt_cooldown"])
@pytest.mark.parametrize("cooldown", [0.2, 0.7])
def test_a_cool_down_holds_the_peak_and_ends_where_the_cosine_did(
    base: Genome, name: str, cooldown: float, tmp_path: Path
) -> None:
    rate = train(after(base, name, cooldown=cooldown), tmp_path, max_steps=1)["learning_rate"]
    peak, warm_up = 3e-3, 0.05
    start = warm_up + (1 - cooldown) * (1 - warm_up)
    rates = [rate(i / 1000) for i in range(1001)]
    for i in range(1001):
        if warm_up <= i / 1000 <= start:
            assert rates[i] == pytest.approx(peak)
        elif i / 1000 > start:
            assert rates[i] <= rates[i - 1] + 1e-12
    assert rates[-1] == pytest.approx(0.1 * peak)
    middle = rate(start + 0.5 * (1 - start))
    straight = pytest.approx(0.55 * peak)
    assert middle == straight if name == "trapezoid" else middle < 0.5 * peak


def test_what_is_saved_after_one_step_is_what_that_step_left(base: Genome, tmp_path: Path) -> None:
    names = train(edited(base, "ema_at_save"), tmp_path, max_steps=1)
    assert same(weights(tmp_path), names["model"].state_dict())


def test_what_is_saved_is_the_power_law_average_of_all_steps(base: Genome, tmp_path: Path) -> None:
    child = after(base, "ema_at_save", power=8)
    text = child.as_dict["train.py"].replace(
        "weight_average.update()",
        "weight_average.update(); seen.append(model.token_embedding.weight.detach().clone())",
    )
    text = text.replace("weight_average = Weight", "seen = []; weight_average = Weight")
    seen = train(child.with_files({"train.py": text}), tmp_path, max_steps=6)["seen"]
    # The product form of (1 - 1 / t) ** 9, written as the weight that each step ends up with.
    ends_with = [(t**9 - (t - 1) ** 9) / 6**9 for t in range(1, 7)]
    assert sum(ends_with) == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(ends_with, seen, strict=True))
    saved = weights(tmp_path)["token_embedding.weight"]
    torch.testing.assert_close(saved, expected)
    assert not torch.equal(saved, seen[-1])


@pytest.mark.parametrize("order", [*itertools.permutations(("cautious", "ema_at_save"))])
def test_what_is_averaged_are_the_steps_that_were_kept(
    base: Genome, order: tuple[str, str], tmp_path: Path
) -> None:
    # Decay this strong moves weights against their gradients from the first step on.
    strong = with_settings(base, **_tiny(warmup_fraction=0.0, weight_decay=100.0))
    names = train(edited(edited(strong, order[0]), order[1]), tmp_path / "both", max_steps=1)
    kept = names["model"].state_dict()
    assert same(weights(tmp_path / "both"), kept)
    train(edited(strong, "ema_at_save"), tmp_path / "uncorrected", max_steps=1)
    assert not same(weights(tmp_path / "uncorrected"), kept)


def test_a_weight_of_two_names_has_one_average(base: Genome, tmp_path: Path) -> None:
    names = train(after(base, "ema_at_save", power=8), tmp_path, max_steps=1)
    table, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = table.weight
    net = nn.ModuleDict({"table": table, "head": head})
    average = names["WeightAverage"](net)
    for value in (1.0, 2.0):
        nn.init.constant_(head.weight, value)
        average.update()
    saved = average.over(net.state_dict())
    assert saved["head.weight"] is saved["table.weight"]
    assert 1 < saved["head.weight"].mean() < 2
    assert average.over({"head.weight": head.weight}).keys() == {"head.weight"}
