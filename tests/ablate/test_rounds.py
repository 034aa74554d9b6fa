"""Variants are trained turn about, failures once, and what is lost is told apart."""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from rich.console import Console

from darwin_exp.ablate.display import Display
from darwin_exp.ablate.rounds import Arm, Rounds, at_once
from darwin_exp.individual import (
    DataSpec,
    Evaluation,
    EvaluationSpec,
    Genome,
    Job,
    JobResult,
    Reason,
    SandboxSpec,
    Status,
    TrainingRun,
    TrainingSpec,
)
from darwin_exp.journal import Journal
from darwin_exp.protocols import InfrastructureFailure, Interrupted
from darwin_exp.trials import Bench, Trials

Answer = Callable[[Job], JobResult]


def arm(name: str) -> Arm:
    return Arm(name, Genome.of({"train.py": f"name = {name!r}\n", "model.py": ""}))


ARMS = [arm("base"), arm("champion"), arm("without-1")]


def scored(job: Job) -> JobResult:
    perplexity = {"gate_perplexity": 8.0}
    return JobResult(
        job.job_id, TrainingRun(Status.OK), Evaluation(Status.OK, metrics=perplexity), 1.0
    )


class AnsweringExecutor:
    """Answers jobs at once."""

    n_slots = 1

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.jobs: list[str] = []

    def submit(self, job: Job) -> Future[JobResult]:
        self.jobs.append(job.job_id)
        future: Future[JobResult] = Future()
        try:
            future.set_result(self.answer(job))
        except InfrastructureFailure as failure:
            future.set_exception(failure)
        return future

    def close(self, cancel: bool = False) -> None:
        pass


@pytest.fixture
def rounds_with(tmp_path: Path) -> Iterator[Callable[..., tuple[Rounds, AnsweringExecutor]]]:
    journal = Journal(tmp_path)

    def make(
        answer: Answer, n_seeds: int = 3, n_slots: int = 1
    ) -> tuple[Rounds, AnsweringExecutor]:
        executor = AnsweringExecutor(answer)
        bench = Bench(
            seed=3,
            integrity_key=b"key",
            data=DataSpec(tmp_path, "hash", 4),
            training=TrainingSpec(1.0, None, 0, 8),
            evaluation=EvaluationSpec("val"),
            sandbox=SandboxSpec("process"),
            run_folder=tmp_path,
        )
        trials = Trials(bench, executor, journal)
        display = Display(Console(quiet=True))
        rounds = Rounds(trials, n_slots, journal, "g01-i00", "gate", n_seeds, display)
        return rounds, executor

    yield make
    journal.close()


def _of(executor: AnsweringExecutor) -> list[str]:
    return [name.removeprefix("ablation/g01-i00/") for name in executor.jobs]


def test_no_variant_always_goes_first(
    rounds_with: Callable[..., tuple[Rounds, AnsweringExecutor]],
) -> None:
    rounds, executor = rounds_with(scored)
    samples = rounds.train(ARMS)
    firsts = [name.split("/")[0] for name in _of(executor)[::3]]
    assert sorted(firsts) == ["base", "champion", "without-1"]
    assert _of(executor)[-1] == "base/2", "no part is compared with what may have run alone"
    assert len(set(executor.jobs)) == 9
    assert [samples[one.genome.id].log_perplexities for one in ARMS] == [(math.log(8),) * 3] * 3


def test_what_is_recorded_is_not_trained_again_and_more_seeds_train_only_those(
    rounds_with: Callable[..., tuple[Rounds, AnsweringExecutor]],
) -> None:
    rounds_with(scored, 2)[0].train(ARMS)
    rounds, executor = rounds_with(scored, 3)
    samples = rounds.train(ARMS)
    assert sorted(_of(executor)) == ["base/2", "champion/2", "without-1/2"]
    assert {sample.n for sample in samples.values()} == {3}


def test_a_variant_that_fails_is_not_trained_again_and_its_failure_is_kept(
    rounds_with: Callable[..., tuple[Rounds, AnsweringExecutor]],
) -> None:
    def answer(job: Job) -> JobResult:
        if "without-1" in job.job_id:
            return JobResult(job.job_id, TrainingRun(Status.CRASHED, Reason.EXCEPTION, "boom"))
        return scored(job)

    rounds, executor = rounds_with(answer)
    samples = rounds.train(ARMS)
    assert [name for name in _of(executor) if "without-1" in name] == ["without-1/0"]
    assert samples[ARMS[2].genome.id].failure == "CRASHED: boom"
    assert samples[ARMS[1].genome.id].n == 3


def test_a_first_training_that_runs_out_of_time_is_one_failure_and_two_are_enough(
    rounds_with: Callable[..., tuple[Rounds, AnsweringExecutor]],
) -> None:
    late = {"champion/0", "without-1/0", "without-1/2"}

    def answer(job: Job) -> JobResult:
        if job.job_id.removeprefix("ablation/g01-i00/") in late:
            return JobResult(job.job_id, TrainingRun(Status.TIMED_OUT, Reason.NO_CHECKPOINT))
        return scored(job)

    rounds, executor = rounds_with(answer, n_seeds=4)
    samples = rounds.train(ARMS)
    once, twice = samples[ARMS[1].genome.id], samples[ARMS[2].genome.id]
    assert (once.n, once.n_failed, once.fails) == (3, 1, False)
    assert (twice.n, twice.n_failed, twice.fails) == (1, 2, True)
    assert "without-1/3" not in _of(executor)


def test_a_seed_is_begun_beside_the_last_and_does_not_count_if_that_decides(
    rounds_with: Callable[..., tuple[Rounds, AnsweringExecutor]],
) -> None:
    second_began = threading.Event()

    def answer(job: Job) -> JobResult:
        if job.job_id.endswith("/1"):
            second_began.set()
            return scored(job)
        assert second_began.wait(20), "a slot stayed idle"
        return JobResult(job.job_id, TrainingRun(Status.CRASHED, Reason.EXCEPTION, "boom"))

    rounds, executor = rounds_with(answer, n_slots=2)
    (sample,) = rounds.train(ARMS[1:2]).values()
    assert (sample.n, sample.n_failed, sample.fails) == (0, 1, True)
    assert sorted(_of(executor))[:2] == ["champion/0", "champion/1"]


def test_a_lost_training_is_tried_again_and_then_counted_as_lost(
    rounds_with: Callable[..., tuple[Rounds, AnsweringExecutor]],
) -> None:
    def answer(job: Job) -> JobResult:
        if "without-1/1" in job.job_id:
            raise InfrastructureFailure("the sandbox broke")
        return scored(job)

    rounds, executor = rounds_with(answer)
    lost = rounds.train(ARMS)[ARMS[2].genome.id]
    assert (lost.n, lost.n_lost, lost.failure) == (2, 1, "")
    assert len([name for name in _of(executor) if "without-1/1" in name]) == 3


def test_the_first_failure_stops_what_runs_and_is_the_one_that_is_told() -> None:
    stopped = threading.Event()
    begun = []

    def failing() -> JobResult:
        raise ValueError("the first")

    def waiting() -> JobResult:
        begun.append(1)
        assert stopped.wait(20)
        raise Interrupted

    with pytest.raises(ValueError, match="the first"):
        at_once([waiting, failing, *[waiting] * 5], 2, stopped.set)
    assert len(begun) == 1, "none was begun after it"
