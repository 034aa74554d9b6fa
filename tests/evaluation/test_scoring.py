"""The scorer's arithmetic, and what it makes of models that behave and models that do not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from darwin_exp.evaluation import scorer
from darwin_exp.evaluation.exchange import Refused
from darwin_exp.evaluation.integrity import Agreement, require_evidence
from darwin_exp.evaluation.likelihood import negative_log_likelihood
from darwin_exp.evaluation.scorer import patience, sample_windows
from darwin_exp.individual import (
    DataSpec,
    Evaluation,
    EvaluationSpec,
    Job,
    JobResult,
    Purpose,
    Reason,
    Status,
    TrainingRun,
)
from darwin_exp.journal import Journal
from darwin_exp.protocols import InfrastructureFailure
from darwin_exp.trials import BASE_ID, Bench, Trial, Trials

Score = Callable[..., Evaluation]
MakeJob = Callable[..., Job]
V, T = 24, 32

# --- arithmetic ---------------------------------------------------------------------------------


@given(
    logits=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 300)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-10, 10, width=32),
    ),
    data=st.data(),
)
def test_a_cost_is_the_log_softmax_in_double_precision(logits: Any, data: st.DataObject) -> None:
    import torch

    n = logits.shape[2]
    targets = data.draw(arrays.arrays(np.int32, logits.shape[:2], elements=st.integers(0, n - 1)))
    expected = -torch.log_softmax(torch.from_numpy(logits).double(), dim=-1)
    expected = expected.gather(2, torch.from_numpy(targets).long()[..., None])[..., 0]
    found = negative_log_likelihood(logits, targets)
    assert np.allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_b16_the_probabilities_of_all_tokens_sum_to_one_whatever_the_logits() -> None:
    logits = np.random.default_rng(0).normal(50, 30, size=(2, 700, 84)).astype(np.float32)
    total = sum(
        np.exp(-negative_log_likelihood(logits, np.full((2, 700), token, dtype=np.int32)))
        for token in range(84)
    )
    assert np.allclose(total, 1.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_b16_one_logit_that_is_no_number_anywhere_is_refused(value: float) -> None:
    logits = np.zeros((3, 500, 84), dtype=np.float32)
    logits[2, 499, 83] = value
    with pytest.raises(Refused) as refused:
        negative_log_likelihood(logits, np.zeros((3, 500), dtype=np.int32))
    assert refused.value.reason is Reason.NONFINITE


def test_b18_windows_hold_every_target_of_the_split_once_and_in_order(data: DataSpec) -> None:
    tokens = np.fromfile(data.folder / "held_out" / "val.bin", dtype="<u2")
    windows, n_available = sample_windows(data, "val", T, at_most=10_000)
    assert n_available == len(windows) == 60
    assert np.array_equal(windows[:, 1:].ravel(), tokens[1:])
    assert np.array_equal(windows[:, :-1].ravel(), tokens[:-1])


def test_a_sample_of_windows_depends_on_the_data_and_on_nothing_else(data: DataSpec) -> None:
    one, n_available = sample_windows(data, "val", T, at_most=20)
    again, _ = sample_windows(data, "val", T, at_most=20)
    other_data = DataSpec(data.folder, "1" * 64, V)
    other, _ = sample_windows(other_data, "val", T, at_most=20)
    assert len(one) == 20
    assert n_available == 60
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_split_that_cannot_be_scored_is_our_failure(data: DataSpec) -> None:
    for split, length, words in (("val", 5_000, "holds 1921 tokens"), ("test", T, "test.bin")):
        with pytest.raises(InfrastructureFailure, match=words):
            sample_windows(data, split, length, at_most=10)
    small_vocabulary = DataSpec(data.folder, data.content_hash, vocab_size=3)
    with pytest.raises(InfrastructureFailure, match="holds token 23 of 3"):
        sample_windows(small_vocabulary, "val", T, at_most=10)


# --- models whose score is known beforehand -------------------------------------------------------


def test_b29_constant_logits_score_exactly_the_floor(score: Score, data: DataSpec) -> None:
    """A table of zeros: every token is as likely as any other."""
    found = score("table")
    tokens = np.fromfile(data.folder / "held_out" / "val.bin", dtype="<u2")[1:]
    n_bytes = int((2 - tokens % 2).sum())
    assert found.status is Status.OK
    assert found.metrics["val_perplexity"] == pytest.approx(V, rel=1e-12)
    assert found.metrics["val_nats"] == pytest.approx(math.log(V), rel=1e-12)
    assert found.metrics["val_bpb"] == pytest.approx(math.log2(V) * len(tokens) / n_bytes)
    assert found.metrics["n_parameters"] == V * V
    assert found.details["causality"]["max"] == 0.0
    assert found.details["prefixes"] >= 44


def test_a_bigram_model_scores_what_its_table_says(score: Score, data: DataSpec) -> None:
    tokens = np.fromfile(data.folder / "held_out" / "val.bin", dtype="<u2").astype(int)
    table = np.random.default_rng(1).normal(0, 1, (V, V)).astype(np.float32)
    logs = table.astype(np.float64)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    expected = -logs[tokens[:-1], tokens[1:]].mean()

    def change(model: Any) -> None:
        import torch

        model.table.copy_(torch.from_numpy(table))

    found = score("table", change)
    assert found.metrics["val_nats"] == pytest.approx(expected, rel=1e-10)
    assert found.metrics["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-10)


def test_b29_random_weights_score_no_better_than_the_floor(score: Score) -> None:
    found = score("attention")
    assert found.status is Status.OK
    assert found.metrics["val_perplexity"] > V


def test_a_score_does_not_depend_on_the_secret(score: Score) -> None:
    one = score("attention", secret=b"one")
    other = score("attention", secret=b"other")
    assert one.metrics["val_nats"] == pytest.approx(other.metrics["val_nats"], rel=1e-6)


def test_the_same_secret_gives_the_same_metrics_to_the_last_bit(score: Score) -> None:
    assert score("recurrent").metrics == score("recurrent").metrics


def test_a_cap_on_logits_scores_fewer_windows_and_says_so(score: Score) -> None:
    found = score("table", evaluation={"max_logits_bytes": 20 * T * V * 4})
    assert found.status is Status.OK
    assert (found.details["windows"], found.details["windows_available"]) == (20, 60)


def test_b6_a_score_below_what_text_allows_is_quarantined(score: Score, data: DataSpec) -> None:
    """All held-out text is one token over and over, which a table learns by heart."""
    folder = data.folder.with_name("monotone")
    (folder / "held_out").mkdir(parents=True, exist_ok=True)
    for name in ("train.bin", "held_out/val.bin"):
        np.zeros(1921, dtype="<u2").tofile(folder / name)
    np.save(folder / "token_byte_lengths.npy", np.ones(V, dtype=np.uint16))

    def change(model: Any) -> None:
        model.table[:, 0] = 10.0

    found = score("table", change, data=DataSpec(folder, "2" * 64, V))
    assert (found.status, found.reason) == (Status.QUARANTINED, Reason.IMPLAUSIBLE)
    assert found.metrics["val_bpb"] < 0.3


# --- models that misbehave ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        ("nan", Reason.NONFINITE, "not all finite"),
        ("infinite", Reason.NONFINITE, "not all finite"),
        ("wide", Reason.SHAPE, "25"),
        ("short", Reason.SHAPE, "31"),
        ("flat", Reason.SHAPE, "are due"),
        ("raises", Reason.MODEL_CODE, "ZeroDivisionError at model.py:"),
        ("exits", Reason.MODEL_CODE, "status 7"),
        ("chatters", Reason.MODEL_CODE, "not in its format"),
        ("learns", Reason.MODEL_CODE, "changed its own weights"),
        ("dropout", Reason.NONDETERMINISM, "random numbers"),
    ],
)
def test_b17_a_model_that_misbehaves_is_rejected_in_words(
    score: Score, kind: str, reason: Reason, words: str
) -> None:
    # Without prefixes, so that what else is wrong shows up.
    found = score(kind, evaluation={"n_prefixes": 0})
    assert (found.status, found.reason) == (Status.REJECTED, reason)
    assert words in found.message
    assert not found.metrics
    assert not found.rates


def test_b14_a_model_that_remembers_what_it_was_asked_is_rejected(score: Score) -> None:
    found = score("memory", evaluation={"n_prefixes": 0})
    assert (found.status, found.reason) == (Status.REJECTED, Reason.NONDETERMINISM)


def test_b14_training_on_what_was_asked_is_rejected_and_would_pay(
    score: Score, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers that were asked in different orders have learnt different things."""
    learning = {"kind": "trains_on_what_it_is_asked", "zoo": "zoo_cheats"}
    found = score(**learning)
    assert (found.status, found.reason) == (Status.REJECTED, Reason.NONDETERMINISM)
    assert "in another order" in found.message
    assert "remembers what it was asked" in found.message
    # The control: asked once, and in one order, it is believed.
    for check in ("check_repeats", "check_alone"):
        monkeypatch.setattr(scorer, check, lambda *_: Agreement(n_positions=1))
    once = {"evaluation": {"n_prefixes": 0, "second_pass": 0.0}}
    believed, honest = score(**learning, **once), score("honest", zoo="zoo_cheats", **once)
    assert believed.status is Status.OK
    assert believed.metrics["val_nats"] < honest.metrics["val_nats"] - 0.1


@pytest.mark.parametrize(
    "check", ["check_order", "check_repeats", "check_alone", "check_causality", "check_unprobed"]
)
def test_b27_a_check_that_compared_nothing_leaves_no_score(
    score: Score, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    monkeypatch.setattr(scorer, check, lambda *_: Agreement())
    with pytest.raises(InfrastructureFailure, match=f"'{check.removeprefix('check_')}' compared"):
        score("table")


def test_b27_a_check_that_was_not_asked_for_is_not_due(score: Score) -> None:
    found = score("table", evaluation={"n_prefixes": 0, "second_pass": 0.0})
    assert found.status is Status.OK
    assert found.details["causality"]["n_positions"] == found.details["order"]["n_positions"] == 0


@pytest.mark.parametrize("missing", [math.nan, math.inf])
def test_b18_a_target_without_a_cost_leaves_no_score(missing: float) -> None:
    nats = np.ones((3, 5))
    require_evidence({"alone": {"n_positions": 5}}, ["alone"], nats)
    nats[2, 4] = missing
    for incomplete in (nats, np.empty((0, 5))):
        with pytest.raises(InfrastructureFailure, match="not every target"):
            require_evidence({"alone": {"n_positions": 5}}, ["alone"], incomplete)


def test_a5_a_model_that_never_answers_ends_at_the_deadline(score: Score) -> None:
    found = score("hangs", evaluation={"seconds": 1.5})
    assert (found.status, found.reason) == (Status.REJECTED, Reason.MODEL_CODE)
    assert "deadline" in found.message
    assert found.scoring_seconds < 20


def test_a5_scoring_is_bounded_by_the_budget_under_the_clock_only(make_job: MakeJob) -> None:
    def found(budget: float, max_steps: int | None) -> tuple[float, float]:
        training = {"budget_seconds": budget, "max_steps": max_steps}
        return patience(make_job(training=training, evaluation={"seconds": 300.0}))

    assert found(5.0, None) == (80.0, 10.0)
    assert found(40.0, None) == (220.0, 20.0)
    assert found(3600.0, None) == (300.0, 1800.0)
    assert found(5.0, 100) == (300.0, 120.0)


def test_a5_a_model_that_hangs_while_it_loads_ends_early(
    score: Score, zoo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "patience", lambda _: (60.0, 1.5))
    hanging = zoo + "\nif __name__ == 'model':\n    while True:\n        pass\n"
    for found in (score("attention", source=hanging), score("hangs")):
        assert (found.status, found.reason) == (Status.REJECTED, Reason.MODEL_CODE)
        assert "its first request" in found.message
        assert found.scoring_seconds < 20
    # What is answered in time leaves the whole scoring its own deadline.
    monkeypatch.setattr(scorer, "patience", lambda _: (60.0, 10.0))
    assert score("attention").status is Status.OK


def test_b12_an_error_quotes_no_held_out_token(score: Score) -> None:
    """Its message would reach the journal and, as a lesson, whoever edits the next model."""
    found = score("quotes")
    assert (found.status, found.reason) == (Status.REJECTED, Reason.MODEL_CODE)
    assert "the tokens are" not in found.message
    assert re.fullmatch(r"the saved model failed: an error at model\.py:\d+", found.message)


def test_an_error_while_loading_is_told_in_full(score: Score, zoo: str) -> None:
    found = score("attention", model=zoo + "\nraise KeyError('forgotten')\n")
    assert "Traceback" in found.message
    assert "KeyError: 'forgotten'" in found.message


def test_half_precision_logits_are_scored_like_any_others(score: Score) -> None:
    found = score("half_precision")
    assert found.status is Status.OK


def test_b3_patching_torch_changes_nothing_that_is_scored(score: Score, zoo: str) -> None:
    patch = """
if __name__ == "model":  # and not when a test builds the weights
    torch.nn.functional.cross_entropy = lambda *a, **k: torch.zeros(())
    torch.nn.functional.log_softmax = lambda x, *a, **k: x * 0
    torch.log_softmax = torch.nn.functional.log_softmax
"""
    honest, patched = score("attention"), score("attention", source=zoo + patch)
    assert honest.metrics == patched.metrics


def test_weights_that_do_not_fit_the_model_are_named(score: Score, zoo: str) -> None:
    more = zoo.replace("self.seen: list", "self.extra = nn.Linear(2, 2)\n        self.seen: list")
    found = score("attention", model=more)
    assert (found.status, found.reason) == (Status.REJECTED, Reason.MODEL_CODE)
    assert "the checkpoint lacks extra.weight" in found.message
    fewer = zoo.replace("self.positions = nn", "self.places = self.positions = nn")
    assert score("attention", model=fewer).status is Status.OK  # tied: one tensor, two names


def test_a_damaged_length_table_is_our_failure(
    score: Score, data: DataSpec, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for name in ("held_out", "train.bin"):
        (folder / name).symlink_to(data.folder / name)
    np.save(folder / "token_byte_lengths.npy", np.ones(V + 1, dtype=np.uint16))
    with pytest.raises(InfrastructureFailure, match="does not fit"):
        score("table", data=DataSpec(folder, "3" * 64, V))


# --- what is claimed ------------------------------------------------------------------------------


class Listening:
    """An executor that only remembers what it was asked to do."""

    n_slots = 1

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> Future[JobResult]:
        self.jobs.append(job)
        future: Future[JobResult] = Future()
        future.set_result(JobResult(job.job_id, TrainingRun(Status.OK), Evaluation(Status.OK)))
        return future

    def close(self, cancel: bool = False) -> None:
        pass


def test_what_is_claimed_is_examined_harder_than_what_is_searched(
    make_job: MakeJob, tmp_path: Path
) -> None:
    job, executor, journal = make_job(), Listening(), Journal(tmp_path)
    spec = EvaluationSpec("val")
    bench = Bench(1, b"key", job.data, job.training, spec, job.sandbox, tmp_path)
    trials = Trials(bench, executor, journal)
    wanted = [("g01-i01", purpose) for purpose in (Purpose.SEARCH, Purpose.CLAIM)]
    wanted += [("g01-i01", Purpose.EQUAL_STEPS), (BASE_ID, Purpose.CLAIM)]
    for who, purpose in wanted:
        name = f"{who}/{purpose.value}"
        trials.run(Trial(name, who, purpose, job.genome, "test", f"individuals/{name}"))
    journal.close()
    searched, claim, at_steps, of_base = (asked.evaluation for asked in executor.jobs)
    assert searched == replace(spec, split="test")
    assert at_steps == of_base == replace(spec, split="test", verify_rate=False)
    assert claim is not None
    assert claim.n_prefixes >= 1_000
    assert claim.cuts_per_window > 1
    assert claim.second_pass > spec.second_pass
    assert not claim.verify_rate
    assert claim.max_logits_bytes == spec.max_logits_bytes  # the same text is scored
