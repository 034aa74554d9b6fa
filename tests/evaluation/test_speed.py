"""FLOPs by the written rule, claims bounded by the harness's own timing, peaks kept per machine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from darwin_exp.evaluation import mfu, rate
from darwin_exp.evaluation.checkpoint import TensorEntry
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
from darwin_exp.evaluation.rate import Speed, _ways
from darwin_exp.individual import Evaluation, Job, Reason, Status, TrainingRun
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


def test_b5_an_honest_claim_is_believed_and_a_false_one_is_bounded(score: Score) -> None:
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
    assert 500 < false.rates["tokens_per_second"] < 1e9
    assert false.rates["mfu"] < 1 < false.rates["mfu_claimed"]
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
    assert found.rates["tokens_per_second"] < 1e9


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


def test_b3_an_account_of_infinite_work_leaves_no_rate(score: Score, zoo: str) -> None:
    lie = """
if __name__ == "model":
    import json
    json.dumps = lambda *a, **k: '{"rows": {}, "activation_flops": 1e308}'
"""
    claim = {"training_run": {"tokens_claimed": 500}, "evaluation": {"peak_flops": 1e12}}
    honest, lying = score("attention", **claim), score("attention", source=zoo + lie, **claim)
    assert honest.rates == lying.rates
    told = Speed(claimed=1e9, bound=math.inf, flops=1e308, peak_flops=1e-3)
    assert told.rates() == {"tokens_per_second": 1e9}
    assert "tokens_per_second_bound" not in told.details()
    assert Speed(claimed=1.0, verified=False, flops=1.0, peak_flops=0.0).rates() == {
        "tokens_per_second": 1.0
    }


def test_b5_a_false_count_takes_little_of_a_slot(make_job: Callable[..., Job]) -> None:
    """Under the clock the search for a fast way ends with the budget, and compiles nothing."""
    now = time.monotonic()
    fastest: dict[tuple[int, bool], float] = {(512, False): 1.0}

    def stops(**training: Any) -> list[float]:
        ways = _ways(make_job(training=training), now + 1000, fastest)
        return sorted({round(stop - now) for *_, stop in ways})

    assert stops(max_steps=None, budget_seconds=2.0) == [2]
    assert stops(max_steps=None, budget_seconds=20.0) == [10]
    assert stops(max_steps=None, budget_seconds=40.0) == [20, 40]
    assert stops(max_steps=None, budget_seconds=3600.0) == [20, 45]
    assert stops(max_steps=5, budget_seconds=2.0) == [20, 45]


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
