"""FLOPs by the written rule, claims bounded by the harness's own timing, peaks kept per machine."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from darwin_exp.closing import retimed
from darwin_exp.evaluation import exchange, mfu, rate
from darwin_exp.evaluation.checkpoint import Checkpoint, TensorEntry
from darwin_exp.evaluation.exchange import _without_own_words
from darwin_exp.evaluation.logits_server import matrix_watch
from darwin_exp.evaluation.mfu import (
    Peak,
    Uses,
    flops_per_token,
    known_peak,
    load_or_measure_peak,
    measure_peak,
    retimed_rate,
)
from darwin_exp.evaluation.rate import Speed, _Way, _ways, known_rows, measure_speed
from darwin_exp.evaluation.told import FreshRows, told_text
from darwin_exp.individual import (
    DataSpec,
    Evaluation,
    Job,
    JobResult,
    Reason,
    Status,
    TrainingRun,
)
from darwin_exp.protocols import InfrastructureFailure

Score = Callable[..., Evaluation]
V, T, C = 24, 32, 32
HEAD, FOUR = 24 * 32, 4 * 32 * 32  # elements of the head and of attention's matrices

# --- the rule, on small pieces --------------------------------------------------------------------


def watched(
    forward: Callable[[Tensor], Tensor], **weights: Tensor
) -> tuple[dict[str, float], float]:
    """Return rows by weight and FLOPs of activation products for one pass over 5 tokens."""
    x = torch.randn(1, 5, 8)
    with matrix_watch()(weights, x) as seen:
        forward(x)
    return seen.rows, seen.activation_flops


def weight(*shape: int) -> Tensor:
    return nn.Parameter(torch.randn(shape))


def test_a_matrix_counts_once_per_row_that_it_is_multiplied_with() -> None:
    w, b = weight(6, 8), weight(6)
    assert watched(lambda x: nn.functional.linear(x, w), w=w)[0] == {"w": 5}
    assert watched(lambda x: nn.functional.linear(x, w, b), w=w, b=b)[0] == {"w": 5}
    assert watched(lambda x: x @ w.t() + x @ w.t(), w=w)[0] == {"w": 10}
    assert watched(lambda x: x[:, ::2] @ w.t(), w=w)[0] == {"w": 3}
    assert watched(lambda x: x @ w[0], w=w)[0] == {"w": pytest.approx(5 / 6)}
    assert watched(lambda x: w @ x[0].t(), w=w)[0] == {"w": 5}


def test_casts_slices_and_joins_of_weights_are_weights_still() -> None:
    w, u, z = weight(6, 8), weight(2, 8), weight(4, 8, 3)
    assert watched(lambda x: x.bfloat16() @ w.bfloat16().t(), w=w)[0] == {"w": 5}
    assert watched(lambda x: x @ w[:3].t(), w=w)[0] == {"w": 2.5}
    assert watched(lambda x: x @ torch.cat([w, u]).t(), w=w, u=u)[0] == {"w": 5, "u": 5}
    assert watched(lambda x: x @ (w / w.norm()).t(), w=w)[0] == {"w": 5}
    assert watched(lambda x: torch.einsum("btc,hcd->bthd", x, z), z=z)[0] == {"z": 5}


def test_what_is_not_multiplied_does_not_count() -> None:
    w, table = weight(6, 8), weight(100, 8)
    rows, flops = watched(lambda x: table[(x[..., 0] > 0).long()] + w[0], w=w, table=table)
    assert (rows, flops) == ({}, 0)


def test_products_of_activations_count_by_their_shapes() -> None:
    assert watched(lambda x: x @ x.transpose(1, 2))[1] == 2 * 5 * 5 * 8
    attention = nn.functional.scaled_dot_product_attention
    assert watched(lambda x: attention(x, x, x, is_causal=True))[1] == 2 * 2 * 5 * 5 * 8
    mask = torch.ones(5, 5).tril() @ torch.ones(5, 5)  # constants, whoever multiplies them
    assert watched(lambda x: x + (mask @ mask)[0, 0])[1] == 0


def test_convolutions_and_recurrences_count_their_kernels() -> None:
    kernel = weight(8, 1, 3)
    rows, _ = watched(
        lambda x: nn.functional.conv1d(x.transpose(1, 2), kernel, padding=1, groups=8), w=kernel
    )
    assert rows == {"w": 5}
    for cell in (nn.GRU(8, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True)):
        weights = {name: p for name, p in cell.named_parameters() if "weight" in name}
        rows, _ = watched(lambda x, cell=cell: cell(x)[0], **weights)  # type: ignore[misc]
        assert rows["weight_ih_l0"] == 5
        assert rows["weight_hh_l0"] in (4, 5)  # the first state may be a constant


def test_flops_are_six_per_element_and_use_plus_three_times_attention() -> None:
    tensors = {"a": TensorEntry("F32", (3, 4), 0), "b": TensorEntry("BF16", (10,), 0)}
    uses = Uses({"a": 2.0, "unknown": 9.0}, activation_flops=100.0)
    assert flops_per_token(tensors, uses) == 6 * 12 * 2 + 300


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"rows": [], "activation_flops": 1},
        {"rows": {"a": "x"}, "activation_flops": 1},
        {"rows": {"a": -1}, "activation_flops": 1},
        {"rows": {"a": 1e300}, "activation_flops": 1},
        {"rows": {"a": 1}, "activation_flops": float("nan")},
        {"rows": {"a": True}, "activation_flops": 1},
        {"rows": {"a": 1}, "activation_flops": 10**400},
        {"rows": {"a": 1}, "activation_flops": float("inf")},
        {"rows": {"a": 1}, "activation_flops": 1e308},
        {"rows": {"a": 1}},
    ],
)
def test_an_impossible_account_of_products_is_not_believed(content: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="told"):
        Uses.parse(content, 32)


# --- whole models, in the real sandbox ------------------------------------------------------------


def speed(found: Evaluation) -> dict[str, Any]:
    details: dict[str, Any] = found.details["speed"]
    return details


def test_attention_has_the_flops_that_a_person_counts(score: Score) -> None:
    found = score("attention", training_run={"tokens_claimed": 10}, evaluation={"peak_flops": 1e9})
    assert speed(found)["flops_per_token"] == 6 * (FOUR + HEAD) + 3 * (4 * T * C)
    flops = speed(found)["flops_per_token"]
    assert found.rates["mfu_claimed"] == pytest.approx(10 * flops / 1e9)


def test_weights_that_reach_no_logit_count_nothing(score: Score, zoo: str) -> None:
    decoy = (
        zoo.replace("self.qkv(x)", "self.other(x)")
        .replace("self.qkv =", "self.other = nn.Linear(C, 3 * C, bias=False)\n        self.qkv =")
        .replace("x + self.mixer(x)", "x + self.mixer(x) + 0.0 * self.mixer.qkv(x)[..., :C]")
    )
    # The saved model multiplies with `qkv` too, but nothing of that arrives in the logits.
    found = score("attention", source=decoy, training_run={"tokens_claimed": 10})
    assert (found.status, found.message) == (Status.OK, "")
    assert speed(found)["flops_per_token"] == 6 * (FOUR + HEAD) + 3 * (4 * T * C)


def test_b5_an_honest_claim_is_believed_and_a_false_one_is_not(score: Score) -> None:
    honest = score(
        "attention",
        training_run={"tokens_claimed": 500},
        evaluation={"verify_rate": True, "peak_flops": 1e12},
    )
    assert honest.rates["tokens_per_second"] == 500.0
    assert honest.rates["mfu"] == honest.rates["mfu_claimed"]
    false = score(
        "attention",
        training_run={"tokens_claimed": 10**12},
        evaluation={"verify_rate": True, "peak_flops": 1e12, "seconds": 4.0},
    )
    assert false.status is Status.OK
    assert set(false.rates) == {"mfu_claimed"}
    assert 500 < speed(false)["tokens_per_second_bound"] < 1e9
    assert "count of tokens is not believed" in speed(false)["note"]
    assert false.metrics == honest.metrics


def test_b4_the_clock_that_bounds_a_claim_is_not_the_candidates(score: Score, zoo: str) -> None:
    patch = (
        "\nif __name__ == 'model':\n    import time\n"
        "    time.time = time.monotonic = time.perf_counter = lambda: 0.0\n"
    )
    found = score(
        "attention",
        source=zoo + patch,
        training_run={"tokens_claimed": 10**12},
        evaluation={"verify_rate": True, "seconds": 4.0},
    )
    assert "tokens_per_second" not in found.rates
    assert speed(found)["tokens_per_second_bound"] < 1e9


def test_b5_what_is_timed_has_the_loss_of_what_is_scored(
    score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = {"tokens_claimed": 10**12}
    evaluation: dict[str, Any] = {"verify_rate": True, "peak_flops": 1e12}
    found = score("shortcut", training_run=claim, evaluation=evaluation)
    assert found.status is Status.OK
    assert speed(found)["tokens_per_second_bound"] is None
    assert "tokens_per_second" not in found.rates
    monkeypatch.setattr(rate, "LOSS_TOLERANCE", {False: math.inf, True: math.inf})
    evaluation["seconds"] = 4.0
    control = score("shortcut", training_run=claim, evaluation=evaluation)
    assert speed(control)["tokens_per_second_bound"] > 0


# A model whose every forward pass takes a twentieth of a second, and how it may seem to be faster.
SLOW = """
import time

HOW = "honest"
build_quickly = build_model

class Slow(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.known, self.timed = model, {}, False

    def forward(self, tokens):
        self.timed = self.timed or torch.is_grad_enabled()
        if HOW == "turns cheap once it is timed" and self.timed:
            return torch.zeros(*tokens.shape, 24).requires_grad_()
        if HOW == "caches":
            key = tuple(tokens.flatten().tolist())
            if key not in self.known:
                with torch.no_grad():
                    self.known[key] = self.answer(tokens)
            return self.known[key].detach().requires_grad_()
        logits = self.answer(tokens)
        return logits.detach().requires_grad_() if HOW == "detaches" else logits

    def answer(self, tokens):
        time.sleep(0.05)
        return self.model(tokens)

def build_model(arguments):
    return Slow(build_quickly(arguments))
"""
FASTEST_SLOW_PASS = 512 / 0.05  # tokens per second


@pytest.fixture
def bound_of(
    score: Score, zoo: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], float | None]:
    """Return a function that finds the bound of a slow model by how it answers."""
    monkeypatch.setattr(rate, "TOKENS_PER_BATCH", {"cpu": (512,)})

    def find(how: str) -> float | None:
        found = score(
            "attention",
            source=zoo + SLOW.replace("honest", how),
            training_run={"tokens_claimed": 10**12},
            evaluation={"verify_rate": True},
        )
        assert (found.status, found.message) == (Status.OK, "")
        assert "tokens_per_second" not in found.rates
        bound: float | None = speed(found)["tokens_per_second_bound"]
        return bound

    return find


def test_b5_a_model_that_turns_cheap_once_it_is_timed_is_not_believed(
    bound_of: Callable[[str], float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers all later questions as cheaply; but another server was asked them before."""
    how = "turns cheap once it is timed"
    assert bound_of(how) is None
    monkeypatch.setattr(rate, "LOSS_TOLERANCE", {False: math.inf, True: math.inf})  # the control
    assert (bound_of(how) or 0.0) > 2 * FASTEST_SLOW_PASS


def test_b5_answers_that_are_remembered_do_not_make_a_model_faster(
    bound_of: Callable[[str], float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < (bound_of("caches") or 0.0) <= 1.1 * FASTEST_SLOW_PASS

    draw = FreshRows.draw

    def draw_the_same(self: FreshRows, n: int) -> Any:
        if not hasattr(self, "drawn"):
            self.drawn = draw(self, 512 // T)  # type: ignore[attr-defined]
        drawn: Any = self.drawn  # type: ignore[attr-defined]
        return drawn[np.arange(n) % len(drawn)]

    monkeypatch.setattr(FreshRows, "draw", draw_the_same)  # the control
    monkeypatch.setattr(rate, "CHECKED_ROWS", 1)
    assert (bound_of("caches") or 0.0) > 1.5 * FASTEST_SLOW_PASS


def test_b5_no_backward_pass_is_taken_for_less_than_its_forward_pass(
    bound_of: Callable[[str], float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < (bound_of("detaches") or 0.0) <= 1.1 * FASTEST_SLOW_PASS / 2
    monkeypatch.setattr(rate, "FORWARD_SHARE", math.inf)  # the control
    assert (bound_of("detaches") or 0.0) > 1.2 * FASTEST_SLOW_PASS / 2


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_forward_passes_alone_leave_an_honest_model_its_rate(
    score: Score, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    claims = {"tokens_claimed": 10**12}
    evaluation: dict[str, Any] = {"verify_rate": True}
    monkeypatch.setattr(rate, "TOKENS_PER_BATCH", {"cpu": (8192,)})
    bound = speed(score(kind, training_run=claims, evaluation=evaluation))
    monkeypatch.setattr(rate, "FORWARD_SHARE", math.inf)
    without = speed(score(kind, training_run=claims, evaluation=evaluation))
    # Both are timed anew, on a machine that has other things to do as well.
    limits = (bound["tokens_per_second_bound"], without["tokens_per_second_bound"])
    assert limits[0] > limits[1] / 2


def test_rows_that_are_timed_are_text_and_none_comes_twice(data: DataSpec, tmp_path: Path) -> None:
    text = told_text(data, 20_000)
    pairs = set(pairwise(text))
    fresh = FreshRows(data, 32, np.random.default_rng(1))
    rows = np.concatenate([fresh.draw(300), fresh.draw(200)])
    assert rows.shape == (500, 32)
    assert len({row.tobytes() for row in rows}) == 500
    for row in rows:  # but for the seam
        assert sum(pair not in pairs for pair in pairwise(row)) <= 1
    text[:31].astype("<u2").tofile(tmp_path / "train.bin")
    short = DataSpec(tmp_path, "1" * 64, V)
    assert FreshRows(short, 32, np.random.default_rng(1)).draw(3).shape == (3, 32)
    assert np.array_equal(FreshRows(short, 31, np.random.default_rng(1)).draw(1)[0], text[:31])
    with pytest.raises(InfrastructureFailure, match="No such file"):
        told_text(DataSpec(tmp_path / "none", "1" * 64, V), 10)


def test_b3_an_account_of_infinite_work_leaves_no_rate(score: Score, zoo: str) -> None:
    lie = """
if __name__ == "model":
    import sys
    account = '{"rows": {}, "activation_flops": 1e308}'
    sys.modules["logits_server"].dumps = lambda *_, **__: account
"""
    claim = {"training_run": {"tokens_claimed": 500}, "evaluation": {"peak_flops": 1e12}}
    honest, lying = score("attention", **claim), score("attention", source=zoo + lie, **claim)
    assert set(honest.rates) == {"tokens_per_second", "mfu", "mfu_claimed"}
    assert set(lying.rates) == {"tokens_per_second"}
    assert "told nothing usable" in speed(lying)["note"]
    assert honest.metrics == lying.metrics
    told = Speed(claimed=1e9, bound=math.inf, flops=1e308, peak_flops=1e-3)
    assert told.rates() == {"tokens_per_second": 1e9}
    assert "tokens_per_second_bound" not in told.details()
    assert Speed(claimed=1.0, verified=False, flops=1.0, peak_flops=0.0).rates() == {
        "tokens_per_second": 1.0
    }


def test_b5_a_false_count_takes_little_of_a_slot(make_job: Callable[..., Job]) -> None:
    """Under the clock the search for a fast way ends with the budget, and compiles nothing."""
    now = time.monotonic()
    eager = {_Way(512, bfloat16=False): 1.0}

    def stops(**training: Any) -> list[float]:
        ways = _ways(make_job(training=training), now + 1000, eager)
        return sorted({round(stop - now) for _, stop in ways})

    assert stops(max_steps=None, budget_seconds=2.0) == [2]
    assert stops(max_steps=None, budget_seconds=20.0) == [10]
    assert stops(max_steps=None, budget_seconds=40.0) == [20, 40]
    assert stops(max_steps=None, budget_seconds=3600.0) == [20, 45]
    assert stops(max_steps=5, budget_seconds=2.0) == [20, 45]


class TimedServer:
    """A model server whose passes take as long as a rate says, and cost what its logits cost."""

    lost = False

    def __init__(self, tokens_per_second: float) -> None:
        self.tokens_per_second = tokens_per_second

    @contextmanager
    def until(self, _: float) -> Iterator[None]:
        yield

    def uses(self, tokens: Any) -> dict[str, Any]:
        return {"rows": {}, "activation_flops": 100.0 * tokens.size}

    def seconds_for(
        self, tokens: Any, steps: int, bfloat16: bool, compiled: bool, backward: bool = True
    ) -> tuple[float, Any]:
        seconds = tokens.size / self.tokens_per_second * (1 if backward else 1 / 3)
        return seconds, np.full(tokens.shape, math.log(V))

    def logits(self, batches: Iterable[Any]) -> Iterator[Any]:
        for tokens in batches:
            yield np.zeros((*tokens.shape, V), dtype=np.float32)


def test_b5_false_token_counts_gain_a_tenth_at_most(make_job: Callable[..., Job]) -> None:
    """Against an honest twin whose training is as fast as the passes of its saved model.

    Who claims a little too much is cut to a tenth above that; who claims double loses all of it.
    """

    def rates_of(tokens: int, verify_rate: bool = True) -> Speed:
        job = make_job(evaluation={"verify_rate": verify_rate, "peak_flops": 1e6})
        server: Any = TimedServer(tokens_per_second=1_000.0)
        claims = timed(tokens, seconds=10.0)
        checkpoint = Checkpoint(Path("model.safetensors"), {}, 0)
        known = known_rows(server, job, 4)
        return measure_speed(server, job, claims, checkpoint, time.monotonic() + 60.0, known)

    honest, more = rates_of(10_000).rates(), rates_of(13_000).rates()
    assert honest["mfu"] == honest["mfu_claimed"] == pytest.approx(0.3)
    for name in ("tokens_per_second", "mfu"):
        assert more[name] == pytest.approx(1.1 * honest[name])
    doubled = rates_of(20_000)
    assert doubled.rates() == {"mfu_claimed": pytest.approx(2.0 * honest["mfu"])}
    assert "comes to 2,000 tokens/s" in doubled.details()["note"]
    control = rates_of(20_000, verify_rate=False).rates()
    assert control["mfu"] == pytest.approx(2.0 * honest["mfu"])


def test_b5_doubling_token_counts_gains_nothing_by_a_re_timing() -> None:
    """Whoever counts double has no rate any more, not even the one that the search believed."""

    def after(counts: float, bound: float | None) -> dict[str, Any]:
        short, long = (
            JobResult(name, timed(round(counts * tokens), seconds))
            for name, tokens, seconds in (("short", 1_000, 2.0), ("long", 5_000, 6.0))
        )
        speed = Speed(500.0, bound, verified=bound is not None, flops=0.3, peak_flops=1_000.0)
        examined = Evaluation(Status.OK, details={"speed": speed.details()})
        return retimed([[short, replace(long, evaluation=examined)]])

    honest = after(counts=1, bound=1_100.0)
    assert honest["tokens_per_second"] == pytest.approx(1_000.0)
    assert honest["mfu"] == pytest.approx(0.3)
    assert after(counts=1.3, bound=1_100.0)["mfu"] == pytest.approx(1.1 * 0.3)
    doubled = after(counts=2, bound=1_100.0)
    assert (doubled["mfu"], doubled["tokens_per_second"]) == (None, None)
    assert "count of tokens is not believed" in doubled["why_none"]
    assert after(counts=2, bound=None)["mfu"] == pytest.approx(2.0 * 0.3)  # the control


def test_the_claim_of_a_re_timing_leaves_out_what_both_runs_spent_on_starting(
    make_job: Callable[..., Job],
) -> None:
    job = make_job(evaluation={"verify_rate": True, "shorter_run": (1_000, 5.0)})
    server: Any = TimedServer(tokens_per_second=1_000.0)
    known = known_rows(server, job, 4)
    checkpoint = Checkpoint(Path("model.safetensors"), {}, 0)
    deadline = time.monotonic() + 60.0
    found = measure_speed(server, job, timed(6_000, 10.0), checkpoint, deadline, known)
    assert found.claimed == 1_000.0
    assert found.bound == pytest.approx(1_100.0)
    assert measure_speed(server, job, timed(6_000, 4.0), checkpoint, deadline, known).note


def test_b5_a_smaller_model_in_the_re_timing_is_measured_by_its_own_size() -> None:
    """Whoever trains another model when told to stop early has its FLOPs and its passes counted."""

    def after(flops: float, bound: float) -> float:
        short, long = JobResult("s", timed(1_000, 2.0)), JobResult("l", timed(5_000, 6.0))
        details = {"speed": Speed(500.0, bound, True, flops, 1_000.0).details()}
        found = retimed([[short, replace(long, evaluation=Evaluation(Status.OK, details=details))]])
        mfu: float = found["mfu"]
        return mfu

    assert after(flops=0.03, bound=11_000.0) == pytest.approx(0.1 * after(0.3, 1_100.0))


def test_a_re_timing_that_could_not_be_examined_says_so() -> None:
    short, long = JobResult("s", timed(1_000, 2.0)), JobResult("l", timed(5_000, 6.0))
    assert "OK" in retimed([[short, long]])["why_none"]
    unknown = Speed(500.0, None, True, None, 1_000.0, note="FLOPs per token are unknown: why")
    examined = Evaluation(Status.OK, details={"speed": unknown.details()})
    told = retimed([[short, replace(long, evaluation=examined)]])
    assert told == {"why_none": "FLOPs per token are unknown: why"}


def test_b6_a_utilisation_above_one_is_quarantined(score: Score) -> None:
    found = score(
        "attention", training_run={"tokens_claimed": 500}, evaluation={"peak_flops": 1000.0}
    )
    assert (found.status, found.reason) == (Status.QUARANTINED, Reason.IMPLAUSIBLE)


def test_what_is_unknown_is_left_out_and_never_zero(score: Score, zoo: str) -> None:
    assert score("attention").rates == {}  # no count of tokens
    claimed = {"tokens_claimed": 500}
    assert set(score("attention", training_run=claimed).rates) == {"tokens_per_second"}
    # A model that cannot be trained keeps its score.
    stubborn = zoo.replace(
        "x = self.embedding", "assert not torch.is_grad_enabled()\n        x = self.embedding"
    )
    found = score(
        "attention",
        source=stubborn,
        training_run=claimed,
        evaluation={"verify_rate": True, "peak_flops": 1e12},
    )
    assert found.status is Status.OK
    assert found.rates == {}
    assert "AssertionError" in speed(found)["note"]


# --- time and words that are not a model's to use -------------------------------------------------

# A model that goes on training once its time is over, before its first answer.
DILIGENT = """
import copy, time

build_plainly = build_model

class Diligent(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.better = model, []  # in a list: it is in no checkpoint

    def forward(self, tokens):
        if not self.better:
            self.better.append(trained(copy.deepcopy(self.model)))
        return self.better[0](tokens)

def trained(model):
    text = (torch.arange(33) + torch.arange(8)[:, None]) % 24
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for _ in range(10):
        with torch.enable_grad():
            logits = model(text[:, :-1]).flatten(0, 1)
            loss = F.cross_entropy(logits, text[:, 1:].flatten())
            weights = list(model.parameters())
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients):
            if gradient is not None:
                weight.data.sub_(0.5 * gradient)
    time.sleep(2.0)  # stands for more of them
    return model

def build_model(arguments):
    return Diligent(build_plainly(arguments))
"""


@pytest.mark.parametrize("batch_tokens", [16 * T, 10**6], ids=["many batches", "one batch"])
def test_b14_a_model_that_goes_on_training_before_it_answers_is_rejected(
    score: Score, zoo: str, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(exchange, "FIRST_GRACE_SECONDS", {"cpu": 1.0})
    evaluation = {"batch_tokens": batch_tokens, "n_prefixes": 0, "second_pass": 0.0}
    diligent = {"source": zoo + DILIGENT, "evaluation": evaluation}
    found = score("attention", **diligent)
    assert (found.status, found.reason) == (Status.REJECTED, Reason.MODEL_CODE)
    assert "neither train nor compile itself" in found.message
    monkeypatch.setattr(exchange, "FIRST_FACTOR", math.inf)  # the control
    gained = score("attention", **diligent)
    assert gained.status is Status.OK
    honest = score("attention", evaluation=evaluation)
    assert gained.metrics["val_nats"] < honest.metrics["val_nats"] - 0.1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ZeroDivisionError at model.py:12", "ZeroDivisionError at model.py:12"),
        ("OutOfMemoryError", "OutOfMemoryError"),
        ("the model changed its own weights while it was scored",) * 2,
        ("Told_7_7_3 at model.py:12", "an error at model.py:12"),
        ("KeyError at model.py:7733123", "KeyError"),
        ("KeyError at model.py:0012", "KeyError"),
        ("KeyError at tokens_7_7_3.py:12", "KeyError"),
        ("KeyError at model.py:12 and 7, 7, 3", "KeyError"),
        ("the tokens are 7, 7, 3", "an error"),
        ("", "an error"),
    ],
)
def test_b12_of_an_error_no_word_is_told_that_a_model_could_choose(line: str, told: str) -> None:
    assert _without_own_words(line) == told


def test_b12_neither_an_error_nor_a_forged_answer_quotes_a_token(score: Score, zoo: str) -> None:
    asked = "self.n_asked += 1"
    assert zoo.count(asked) == 1
    text = "' '.join(map(str, tokens.flatten().tolist())).encode()"
    forged = f"text = {text}; os.write(5, b'\\x01' + len(text).to_bytes(12, 'little') + text)"
    sizes = "os.write(5, bytes(1) + tokens.flatten()[:12].to(torch.uint8).numpy().tobytes())"
    named = "raise type('Told' + str(tokens[0, 0].item()), (Exception,), {})('told')"
    for line, told in (
        (forged, r"the saved model failed: an error"),
        (named, r"the saved model failed: an error at model\.py:\d+"),
        (sizes, r"logits have shape \((\d{1,2}|over \d+)(, (\d{1,2}|over \d+)){2}\), .* are due"),
    ):
        found = score("attention", model=zoo.replace(asked, line))
        assert found.status is Status.REJECTED
        assert re.fullmatch(told, found.message), found.message


# --- re-timing and peaks --------------------------------------------------------------------------


def timed(tokens: int | None, seconds: float) -> TrainingRun:
    return TrainingRun(Status.OK, tokens_claimed=tokens, training_seconds=seconds)


def test_a_re_timed_rate_is_the_slope_between_two_runs() -> None:
    assert retimed_rate(timed(1_000, 3.0), timed(5_000, 5.0)) == 2_000


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (timed(None, 1.0), timed(5, 2.0)),
        (timed(5, 1.0), timed(5, 2.0)),
        (timed(1, 2.0), timed(5, 2.0)),
    ],
)
def test_runs_without_a_slope_have_no_rate(short: TrainingRun, long: TrainingRun) -> None:
    with pytest.raises(ValueError, match=r"re-timing|rate"):
        retimed_rate(short, long)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("cpu", None),
    ],
)
def test_known_gpus_have_the_peak_of_their_data_sheet(name: str, teraflops: float | None) -> None:
    found = known_peak(name)
    assert (None if found is None else found.flops / 1e12) == teraflops


def test_a_peak_is_measured_with_every_slot_at_work() -> None:
    found = measure_peak(threads=1, slots=[(0,)], seconds=0.05)
    assert found.dtype in ("float32", "bfloat16")
    assert 1e8 < found.flops < 1e14
    assert found.measured


def test_a_peak_that_cannot_be_measured_is_our_failure() -> None:
    with pytest.raises(InfrastructureFailure, match="no slot"):
        measure_peak(threads=1, slots=[])
    with pytest.raises(InfrastructureFailure, match="could not be measured"):
        measure_peak(threads=1, slots=[(0,)], device="cuda", seconds=0.05)


def test_a_peak_is_measured_once_per_machine_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def count(threads: int, slots: Any, device: str) -> Peak:
        assert device == "cpu"
        calls.append((threads, len(slots)))
        return Peak("float32", 1e9 * len(calls))

    monkeypatch.setattr(mfu, "measure_peak", count)
    one = load_or_measure_peak(tmp_path / "cache", 1, [(0,)])
    assert load_or_measure_peak(tmp_path / "cache", 1, [(0,)]) == one
    load_or_measure_peak(tmp_path / "cache", 2, [(0, 1)])
    load_or_measure_peak(tmp_path / "cache", 1, [(0,), (1,)])
    assert calls == [(1, 1), (2, 1), (1, 2)]
    path = tmp_path / "cache" / "peaks.json"
    assert len(json.loads(path.read_text())) == 3
    assert {p.name for p in path.parent.iterdir()} == {"peaks.json", "peaks.lock"}
    path.write_text('{"damaged": ')
    assert load_or_measure_peak(tmp_path / "cache", 1, [(0,)]).flops == 4e9
