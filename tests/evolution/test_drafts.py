"""Drafts: the gates before training, what a second draft is told, and the smoke run."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from darwin_exp.individual import (
    Genome,
    Job,
    JobResult,
    ModelSpec,
    Proposal,
    Purpose,
    Reason,
    Status,
    TrainingRun,
)
from darwin_exp.journal import Journal, comparable
from darwin_exp.protocols import EditFailed, EditRequest
from darwin_exp.summary import summarise

Rehearse = Callable[..., Any]
SMALL = {"population_size": 3, "n_survivors": 1, "n_generations": 1}


class Told:
    """Appends a line, and remembers what it was told; `trouble` decides what it raises."""

    trusted = False

    def __init__(
        self,
        trouble: Callable[[EditRequest], EditFailed | None] = lambda _: None,
        max_drafts: int = 2,
    ) -> None:
        self.trouble, self.max_drafts = trouble, max_drafts
        self.told: list[EditRequest] = []

    def propose(self, request: EditRequest, rng: Random) -> Proposal:
        self.told.append(request)
        if trouble := self.trouble(request):
            raise trouble
        return self._appended(request, request.parent.genome, rng)

    def repair(
        self, request: EditRequest, failed: Proposal, failure: JobResult, rng: Random
    ) -> Proposal:
        self.told.append(request)
        if trouble := self.trouble(request):
            raise trouble
        return self._appended(request, failed.genome, rng)

    def _appended(self, request: EditRequest, genome: Genome, rng: Random) -> Proposal:
        code = genome.as_dict["train.py"] + f"step = {rng.randrange(10**9)}\n"
        return Proposal(
            genome.with_files({"train.py": code}),
            request.parent.edits,
            0,
            "a line more",
            model=ModelSpec("m", "http://127.0.0.1/v1"),
            requests=({"type": "question", "reason": "why", "content": "what"},),
        )


def _ends(journal: Journal) -> dict[str, str]:
    return {
        event.key: event.payload["reason"]
        for event in journal.of_kind("individual")
        if event.payload["editor_id"] is not None
    }


def test_an_answer_that_could_not_be_used_is_followed_by_one_that_is_told_why(
    rehearse: Rehearse,
) -> None:
    def once(request: EditRequest) -> EditFailed | None:
        if request.objections:
            return None
        return EditFailed(Reason.MALFORMED, "that was no JSON", again=True)

    mutator = Told(once)
    journal = rehearse(plan=SMALL, mutator=mutator).run()
    assert set(_ends(journal).values()) == {"none"}
    seconds = [request for request in mutator.told if request.objections]
    assert len(seconds) == len(mutator.told) / 2 > 0
    assert {request.objections for request in seconds} == {("that was no JSON",)}


def test_a_mutator_that_knows_no_better_is_not_asked_again(rehearse: Rehearse) -> None:
    mutator = Told(lambda _: EditFailed(Reason.NOTHING_TO_EDIT, "nothing fits"))
    journal = rehearse(plan=SMALL, mutator=mutator).run()
    assert set(_ends(journal).values()) == {"nothing_to_edit"}
    assert not any(request.objections for request in mutator.told)


def test_a_request_says_whom_it_is_for_and_what_is_known_of_the_base(rehearse: Rehearse) -> None:
    mutator = Told()
    journal = rehearse(plan={**SMALL, "n_generations": 2}, mutator=mutator).run()
    by_id = {request.individual_id: request for request in mutator.told}
    assert by_id.keys() == _ends(journal).keys()
    assert all(request.base is not None for request in mutator.told)
    # Noise is known once the base was trained twice, and a generation that began before is closed.
    assert by_id["g00-i01"].noise is None
    last = by_id["g02-i00"].noise
    assert last is not None
    assert last > 0


def test_the_model_that_an_agent_owns_is_part_of_its_record(rehearse: Rehearse) -> None:
    journal = rehearse(plan=SMALL, mutator=Told()).run()
    child = journal.find("individual", "g00-i01")
    proposal = journal.find("proposal", "g00-i01/0")
    assert child is not None
    assert proposal is not None
    assert child.payload["model"] == proposal.payload["model"]
    assert child.payload["model"]["name"] == "m"
    assert proposal.payload["requests"] == [
        {"type": "question", "reason": "why", "content": "what"}
    ]


def _smoke_fails(job: Job) -> JobResult | None:
    if job.purpose is not Purpose.SMOKE or job.job_id.endswith("-1"):
        return None
    log = "step 1\nTraceback (most recent call last):\nNameError: name 'ratee' is not defined"
    training = TrainingRun(Status.CRASHED, Reason.EXCEPTION, "exit status 1", log_tail=log)
    return JobResult(job.job_id, training)


def test_a_draft_that_fails_its_first_steps_is_sent_back_with_its_traceback(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    mutator, executor = Told(), executor_with(rule=_smoke_fails)
    plan = {**SMALL, "smoke_steps": 3}
    journal = rehearse(plan=plan, mutator=mutator, executor=executor).run()
    assert set(_ends(journal).values()) == {"none"}
    (objection,) = next(request for request in mutator.told if request.objections).objections
    assert "| NameError: name 'ratee' is not defined" in objection
    smoke = [job for job in executor.jobs if job.purpose is Purpose.SMOKE]
    assert len(smoke) == 2 * len(_ends(journal))
    assert all(job.evaluation is None and job.training.max_steps == 3 for job in smoke)


def test_without_a_smoke_run_the_same_code_gets_a_budget(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    """The control: what the gate turns down is trained where there is none."""
    executor = executor_with(rule=_smoke_fails)
    rehearse(plan=SMALL, mutator=Told(), executor=executor).run()
    assert not any(job.purpose is Purpose.SMOKE for job in executor.jobs)


def test_code_that_never_passes_is_invalid_and_never_trained(
    rehearse: Rehearse, executor_with: Callable[..., Any], fail: Callable[..., JobResult]
) -> None:
    def rule(job: Job) -> JobResult | None:
        if job.purpose is Purpose.SMOKE:
            return fail(job, Status.CRASHED, Reason.EXCEPTION, "exit status 1")
        return None

    executor = executor_with(rule=rule)
    plan = {**SMALL, "smoke_steps": 3}
    rehearsal = rehearse(plan=plan, mutator=Told(), executor=executor)
    journal = rehearsal.run()
    assert set(_ends(journal).values()) == {"smoke"}
    assert not any(job.purpose is Purpose.SEARCH for job in executor.jobs)
    told = journal.of_kind("individual")[-1].payload["message"]
    assert told == "its first steps ended as CRASHED (exception): exit status 1"
    result = summarise([*_with_run(journal)], rehearsal.the_plan.n_requested, "finished")
    assert result["failed"] == {"INVALID": rehearsal.the_plan.n_requested}
    assert result["error_rate"] == 1.0


def _with_run(journal: Journal) -> list[Any]:
    from darwin_exp.protocols import Event

    return [Event(0, "run", "run", {}, {"run_id": "r"}), *journal.events()]


def test_what_was_turned_down_is_told_to_those_who_come_after(
    rehearse: Rehearse, executor_with: Callable[..., Any], fail: Callable[..., JobResult]
) -> None:
    def rule(job: Job) -> JobResult | None:
        if job.purpose is Purpose.SMOKE:
            return fail(job, Status.CRASHED, Reason.EXCEPTION, "exit status 1")
        return None

    mutator = Told()
    plan = {**SMALL, "smoke_steps": 3}
    journal = rehearse(plan=plan, mutator=mutator, executor=executor_with(rule=rule)).run()
    ends = [event.payload for event in journal.of_kind("individual") if event.payload["editor_id"]]
    assert {end["summary"] for end in ends} == {"a line more"}
    (later,) = [request for request in mutator.told if request.generation == 1][:1]
    assert later.lessons
    assert all(lesson.error.startswith("smoke: its first steps") for lesson in later.lessons)


def test_a_repair_that_changes_nothing_is_not_trained_again(
    rehearse: Rehearse, executor_with: Callable[..., Any], fail: Callable[..., JobResult]
) -> None:
    class Commenting(Told):
        def repair(
            self, request: EditRequest, failed: Proposal, failure: JobResult, rng: Random
        ) -> Proposal:
            self.told.append(request)
            code = failed.genome.as_dict["train.py"] + "# mended\n"
            return Proposal(failed.genome.with_files({"train.py": code}), failed.edits, 0, "mended")

    def rule(job: Job) -> JobResult | None:
        if job.purpose is Purpose.SEARCH:
            return fail(job, Status.CRASHED, Reason.EXCEPTION, "boom")
        return None

    mutator, executor = Commenting(), executor_with(rule=rule)
    journal = rehearse(plan=SMALL, mutator=mutator, executor=executor).run()
    searches = [job for job in executor.jobs if job.purpose is Purpose.SEARCH]
    assert len(searches) == len(_ends(journal))
    told = {objection for request in mutator.told for objection in request.objections}
    assert told == {"a repair that changes nothing but comments, layout or a seed"}


def test_a_smoke_run_that_we_lost_speaks_against_nobody(
    rehearse: Rehearse, executor_with: Callable[..., Any], fail: Callable[..., JobResult]
) -> None:
    def rule(job: Job) -> JobResult | None:
        if job.purpose is Purpose.SMOKE:
            return fail(job, Status.INFRA_LOST, Reason.INFRASTRUCTURE, "the engine went away")
        return None

    plan = {**SMALL, "smoke_steps": 3}
    journal = rehearse(plan=plan, mutator=Told(), executor=executor_with(rule=rule)).run()
    assert set(_ends(journal).values()) == {"none"}


@pytest.mark.parametrize("max_drafts", [1, 2])
def test_a_repair_that_does_not_pass_is_sent_back_as_well(
    rehearse: Rehearse,
    executor_with: Callable[..., Any],
    fail: Callable[..., JobResult],
    max_drafts: int,
) -> None:
    def rule(job: Job) -> JobResult | None:
        if job.purpose is Purpose.SEARCH and job.job_id.endswith("/0"):
            return fail(job, Status.CRASHED, Reason.EXCEPTION, "boom")
        return None

    def trouble(request: EditRequest) -> EditFailed | None:
        if request.attempt == 1 and not request.objections:
            return EditFailed(Reason.DOES_NOT_APPLY, "stands nowhere", again=True)
        return None

    mutator = Told(trouble, max_drafts)
    journal = rehearse(plan=SMALL, mutator=mutator, executor=executor_with(rule=rule)).run()
    ends = [event.payload for event in journal.of_kind("individual") if event.payload["editor_id"]]
    assert all(end["repaired"] is (max_drafts == 2) for end in ends)
    assert {request.attempt for request in mutator.told} == {0, 1}


def test_a_resumed_run_finds_its_smoke_runs_in_the_journal(
    rehearse: Rehearse, executor_with: Callable[..., Any]
) -> None:
    plan = {**SMALL, "smoke_steps": 3}
    whole = rehearse("a", plan=plan, mutator=Told(), executor=executor_with(rule=_smoke_fails))
    first = comparable(whole.run().events())
    again = executor_with(rule=_smoke_fails)
    resumed = rehearse("a", plan=plan, mutator=Told(), executor=again).run()
    assert comparable(resumed.events()) == first
    assert again.jobs == []
