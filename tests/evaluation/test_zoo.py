"""No honest architecture is turned away and no cheat gets through, whatever the secret.

`make test` tries each of them once, `make test-integrity` ten times more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from darwin_exp.evaluation import integrity
from darwin_exp.individual import DataSpec, Evaluation, Reason, Status
from tests.evaluation.zoo_cheats import MIXES, PLACES
from tests.evaluation.zoo_honest import RECIPES

Score = Callable[..., Evaluation]
V, T = 24, 32
LIKE_A_CLAIM = {"n_prefixes": 4 * 48, "cuts_per_window": 2, "second_pass": 0.5}

# What each cheat is refused for: most read ahead, some answer differently each time.
CHANGES_ITS_ANSWERS = {
    "standardised_over_the_batch",
    "neighbour_in_the_batch",
    "drifting",
    "trains_on_what_it_is_asked",
    "known_windows",
    "later_requests",
}
CHEATS = [*MIXES, *PLACES, "counts_of_the_window", "trains_on_what_it_is_asked"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Train on one thread: these models are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def taught(data: DataSpec, seed: int = 0) -> Callable[[Any], None]:
    """Return what trains a model for a moment, so that its weights are those of a trained one."""

    def teach(model: Any) -> None:
        text = torch.from_numpy(np.fromfile(data.folder / "train.bin", dtype="<u2").astype("<i8"))
        generator = torch.Generator().manual_seed(seed)
        for step in range(30):
            starts = torch.randint(len(text) - T, (16, 1), generator=generator)
            tokens = text[starts + torch.arange(T + 1)]
            with torch.enable_grad():
                logits = model(tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * (1.0 - step / 30) * parameter.grad.sign()
                    parameter.grad = None

    return teach


def assert_passes(found: Evaluation) -> None:
    assert (found.status, found.message) == (Status.OK, "")
    for check in ("causality", "unprobed", "order", "repeats", "alone"):
        assert found.details[check]["n_positions"] > 0
    assert found.metrics["val_nats"] < math.log(V)  # better than chance: it was trained


def assert_caught(found: Evaluation, kind: str) -> None:
    changes = kind in CHANGES_ITS_ANSWERS
    reason = Reason.NONDETERMINISM if changes else Reason.CAUSALITY
    assert (found.status, found.reason) == (Status.REJECTED, reason)
    assert ("in another order" if changes else "reads ahead") in found.message
    assert not found.metrics
    assert not found.rates


# --- once -----------------------------------------------------------------------------------------


def test_the_zoo_is_as_large_as_promised() -> None:
    assert len(RECIPES) == len(set(RECIPES.values())) >= 30


@pytest.mark.parametrize("kind", RECIPES)
def test_an_honest_architecture_passes(score: Score, data: DataSpec, kind: str) -> None:
    assert_passes(score(kind, taught(data), zoo="zoo_honest"))


@pytest.mark.parametrize("kind", CHEATS)
def test_b7_to_b14_a_cheat_is_caught(score: Score, kind: str) -> None:
    # What is rare is left to claims, which look everywhere.
    evaluation = LIKE_A_CLAIM if kind == "rare_windows" else {}
    assert_caught(score(kind, zoo="zoo_cheats", evaluation=evaluation), kind)


def test_b7_control_what_all_cheats_have_in_common_passes(score: Score) -> None:
    assert score("honest", zoo="zoo_cheats").status is Status.OK


@pytest.mark.parametrize("kind", ["in_text", "late_positions", "long_windows", "rare_windows"])
def test_b8_control_without_prefixes_it_passes_and_pays(score: Score, kind: str) -> None:
    cheating = score(kind, zoo="zoo_cheats", evaluation={"n_prefixes": 0})
    honest = score("honest", zoo="zoo_cheats", evaluation={"n_prefixes": 0})
    assert cheating.status is Status.OK
    assert cheating.metrics["val_nats"] < honest.metrics["val_nats"] - 0.05


def test_what_passes_gains_less_than_the_tolerance(score: Score, zoo: str) -> None:
    """A leak below what rounding explains is not seen; that bounds what it is worth."""
    faint = zoo.replace("logits + 0.04 *", "logits + 0.001 *")
    assert faint != zoo
    found, honest = score("whisper", source=faint), score("plain")
    assert found.status is Status.OK
    gained = honest.metrics["val_nats"] - found.metrics["val_nats"]
    assert 0 < gained < integrity.MEAN_TOLERANCE


# --- ten times ------------------------------------------------------------------------------------


@pytest.mark.integrity
@pytest.mark.parametrize("repeat", range(10))
@pytest.mark.parametrize("kind", RECIPES)
def test_an_honest_architecture_passes_under_any_secret(
    score: Score, data: DataSpec, kind: str, repeat: int
) -> None:
    found = score(
        kind,
        taught(data, seed=repeat),
        zoo="zoo_honest",
        weights_seed=100 + repeat,
        secret=f"secret {repeat}".encode(),
        evaluation=LIKE_A_CLAIM if repeat % 2 else {},
    )
    assert_passes(found)


@pytest.mark.integrity
@pytest.mark.parametrize("repeat", range(10))
@pytest.mark.parametrize("kind", CHEATS)
def test_b7_to_b14_a_cheat_is_caught_under_any_secret(score: Score, kind: str, repeat: int) -> None:
    found = score(
        kind,
        zoo="zoo_cheats",
        weights_seed=100 + repeat,
        secret=f"secret {repeat}".encode(),
        evaluation=LIKE_A_CLAIM if repeat % 2 or kind == "rare_windows" else {},
    )
    assert_caught(found, kind)
