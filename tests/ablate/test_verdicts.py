"""Verdicts on parts: what is clear is said, and what chance can explain is not."""

import random
from dataclasses import replace

import pytest

from darwin_exp.ablate.dissection import Part
from darwin_exp.ablate.verdicts import (
    Finding,
    Sample,
    advice,
    droppable,
    fails_for_good,
    judge,
)
from darwin_exp.individual import Evaluation, Genome, JobResult, Reason, Status, TrainingRun


def part(name: str, **changes: object) -> Part:
    genome = Genome.of({"train.py": f"name = {name!r}\n", "model.py": ""})
    return replace(Part(name, "what", "train.py", "edit", genome), **changes)  # type: ignore[arg-type]


def found(champion: list[float], **without: list[float]) -> dict[str, Finding]:
    parts = [part(name) for name in without]
    samples = {one.without.id: Sample(tuple(without[one.name])) for one in parts}
    return {f.part.name: f for f in judge(parts, samples, Sample(tuple(champion)))}


CHAMPION = [2.00, 2.01, 1.99, 2.00]


def test_a_part_pays_costs_or_is_unclear_by_what_its_absence_does() -> None:
    findings = found(
        CHAMPION,
        good=[2.20, 2.21, 2.19, 2.20],
        bad=[1.80, 1.81, 1.79, 1.80],
        idle=[2.01, 1.99, 2.00, 2.00],
    )
    assert {name: f.verdict for name, f in findings.items()} == {
        "good": "pays",
        "idle": "unclear",
        "bad": "costs",
    }
    good = findings["good"]
    assert good.contribution_percent == pytest.approx(18.13, abs=0.01)
    assert good.ci95 is not None
    assert good.ci95[0] < 18.13 < good.ci95[1]
    assert list(findings) == ["good", "idle", "bad"], "sorted by contribution"


def test_a_part_without_effect_is_never_called_paying() -> None:
    assert found(CHAMPION, idle=CHAMPION)["idle"].verdict == "unclear"
    assert found([2.0, 2.0], idle=[2.0, 2.0])["idle"].verdict == "unclear"
    same = judge([part("same", same=True)], {}, Sample((2.0, 2.1)))[0]
    assert (same.verdict, same.contribution_percent, same.ci95) == ("unclear", 0.0, (0.0, 0.0))


def test_chance_names_a_useless_part_in_no_more_than_one_ablation_of_twenty() -> None:
    rng = random.Random(0)
    named = by_interval_alone = 0
    for _ in range(600):
        draws = [[rng.gauss(2, 0.03) for _ in range(4)] for _ in range(7)]
        findings = found(draws[0], **{f"p{k}": draw for k, draw in enumerate(draws[1:])})
        named += any(f.verdict in ("pays", "costs") for f in findings.values())
        by_interval_alone += any(
            f.ci95 is not None and not f.ci95[0] <= 0 <= f.ci95[1] for f in findings.values()
        )
    assert named <= 600 * 0.07
    assert by_interval_alone > 600 * 0.1, "the correction is what keeps it down"


def test_a_part_beside_zero_is_clear_alone_and_unclear_among_many() -> None:
    champion, beside = [2.00, 2.02, 1.98, 2.00], [2.04, 2.02, 2.06, 2.04]
    alone = found(champion, one=beside)["one"]
    assert alone.verdict == "pays"
    idle = {f"idle{k}": [2.01, 1.99, 2.02, 1.98] for k in range(8)}
    among = found(champion, one=beside, **idle)["one"]
    assert among.p_value == alone.p_value
    assert among.verdict == "unclear"


def test_what_cannot_be_trained_fails_and_what_was_lost_is_unclear() -> None:
    training = TrainingRun(Status.CRASHED, Reason.EXCEPTION, "NameError")
    ok = JobResult(
        "b", TrainingRun(Status.OK), Evaluation(Status.OK, metrics={"gate_perplexity": 7})
    )
    lost = JobResult("c", TrainingRun(Status.INFRA_LOST, Reason.INFRASTRUCTURE, "no disk"))
    crashed, gone = part("crashed"), part("gone")
    samples = {
        crashed.without.id: Sample.of([JobResult("a", training)], "gate"),
        gone.without.id: Sample.of([ok, lost], "gate"),
    }
    parts = [part("broken", flaw="train.py does not parse"), crashed, gone]
    findings = {f.part.name: f for f in judge(parts, samples, Sample((2.0, 2.1)))}
    assert [findings[name].verdict for name in ("broken", "crashed", "gone")] == [
        "fails",
        "fails",
        "unclear",
    ]
    assert "NameError" in findings["crashed"].note
    assert "does not parse" in findings["broken"].note
    assert "1 of its trainings lost" in findings["gone"].note
    assert findings["gone"].contribution_percent is None
    assert droppable(list(findings.values()), also_unclear=True) == []


def test_what_came_out_no_worse_may_be_dropped_and_what_is_unclear_only_if_asked() -> None:
    findings = list(
        found(
            CHAMPION,
            good=[2.20, 2.21, 2.19, 2.20],
            maybe=[2.02, 1.99, 2.01, 2.00],
            idle=[1.99, 2.00, 1.99, 2.00],
            bad=[1.80, 1.81, 1.79, 1.80],
        ).values()
    )
    assert droppable(findings) == ["bad", "idle"]
    assert droppable(findings, also_unclear=True) == ["bad", "idle", "maybe"]
    said = advice(findings)
    assert said.startswith("Could be dropped: bad, idle")
    assert "kept for now: maybe" in said
    assert "good" not in said
    assert "Nothing is to be dropped" in advice(findings[:1])


def test_parts_that_change_nothing_by_construction_are_not_corrected_for() -> None:
    champion, beside = Sample((2.00, 2.02, 1.98, 2.00)), Sample((2.04, 2.02, 2.06, 2.04))
    one = part("one")
    same = [part(f"same{k}", same=True) for k in range(8)]
    findings = judge([one, *same], {one.without.id: beside}, champion)
    assert {f.part.name: f.verdict for f in findings}["one"] == "pays"
    assert {f.p_value for f in findings if f.part.same} == {None}


OK = JobResult("j", TrainingRun(Status.OK), Evaluation(Status.OK, metrics={"gate_perplexity": 7}))


def ended(status: Status) -> JobResult:
    return OK if status is Status.OK else JobResult("j", TrainingRun(status, Reason.EXCEPTION, "x"))


@pytest.mark.parametrize(
    ("statuses", "fails"),
    [
        ("CRASHED", True),
        ("INVALID", True),
        ("INFRA_LOST CRASHED", True),
        ("TIMED_OUT", False),
        ("OUT_OF_MEMORY OK OK", False),
        ("OK CRASHED", False),
        ("OK CRASHED OK REJECTED", True),
        ("TIMED_OUT OUT_OF_MEMORY", True),
        ("INFRA_LOST INFRA_LOST", False),
    ],
)
def test_a_variant_fails_at_its_first_crash_or_its_second_failure(
    statuses: str, fails: bool
) -> None:
    assert fails_for_good([ended(Status[one]) for one in statuses.split()]) is fails


def test_a_single_failure_among_several_trainings_is_told_and_the_rest_compared() -> None:
    late = ended(Status.TIMED_OUT)
    one = part("one")
    (finding,) = judge([one], {one.without.id: Sample.of([late, OK, OK], "gate")}, Sample((2, 2.1)))
    assert (finding.verdict, finding.n) == ("unclear", 2)
    assert "1 of 3 trainings failed: TIMED_OUT" in finding.note


def test_nothing_is_said_to_be_droppable_where_fitness_is_another() -> None:
    findings = list(found(CHAMPION, idle=[1.99, 2.00, 1.99, 2.00]).values())
    assert "Could be dropped: idle" in advice(findings)
    said = advice(findings, "mfu")
    assert "of perplexity only" in said
    assert "idle" not in said
