"""Every executor keeps the same contract, with real sandboxes under it."""

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from darwin_exp import execution
from darwin_exp.evaluation import job as scoring
from darwin_exp.execution import SerialExecutor, ThreadsExecutor
from darwin_exp.individual import (
    DataSpec,
    Genome,
    Job,
    JobResult,
    Purpose,
    Reason,
    SandboxSpec,
    Status,
    TrainingRun,
    TrainingSpec,
)
from darwin_exp.protocols import Executor, InfrastructureFailure, Interrupted

HONEST = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file

job = Path(sys.argv[1])
out = job.parent / json.loads(job.read_text())["out"]
(out / "model.json").write_text("{}")
(out / "progress.jsonl").write_text('{"step": 1, "tokens": 10, "loss": 2.0}\\n')
save_file({"weight": np.ones((2, 2), dtype=np.float32)}, out / "model.safetensors")
"""
SLOW = "import time\ntime.sleep(60)\n"
SPEC = SandboxSpec("process")
MakeJob = Callable[..., Job]


@pytest.fixture
def job_of(tmp_path: Path) -> MakeJob:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.bin").write_bytes(bytes(200))
    names = iter(range(1000))

    def make(code: str, kind: str = "process", seconds: float = 30.0) -> Job:
        name = f"job-{next(names)}"
        return Job(
            name,
            name,
            Purpose.SEARCH,
            Genome.of({"train.py": code, "model.py": ""}),
            DataSpec(data, "hash", 4),
            TrainingSpec(seconds, 1, 0, 8),
            SandboxSpec(kind),
            None,
            b"secret",
            tmp_path / name,
        )

    return make


def _serial() -> Executor:
    return SerialExecutor((min(os.sched_getaffinity(0)),), SPEC)


def _threads() -> Executor:
    cores = sorted(os.sched_getaffinity(0))
    return ThreadsExecutor([(cores[0],), (cores[-1],)], SPEC)


@pytest.fixture(scope="class", params=[_serial, _threads], ids=["serial", "threads"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """One for a whole class: warming its sandboxes up takes seconds."""
    made: Executor = request.param()
    yield made
    made.close(cancel=True)


class TestEveryExecutor:
    def test_a_job_comes_back_with_what_its_training_left(
        self, executor: Executor, job_of: MakeJob
    ) -> None:
        result = executor.submit(job_of(HONEST)).result(60)
        assert result.training.status is Status.OK, result.training
        assert result.training.tokens_claimed == 10
        assert result.evaluation is None
        assert result.training.artefacts is not None
        assert (result.training.artefacts / "model.safetensors").is_file()

    def test_a_candidate_that_fails_is_a_result_and_not_an_exception(
        self, executor: Executor, job_of: MakeJob
    ) -> None:
        result = executor.submit(job_of("raise RuntimeError('boom')")).result(60)
        assert result.training.status is Status.CRASHED
        assert "boom" in result.training.log_tail
        assert executor.submit(job_of(HONEST)).result(60).training.status is Status.OK

    def test_what_is_our_fault_is_an_infrastructure_failure_and_the_next_job_runs(
        self, executor: Executor, job_of: MakeJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        build = execution.build

        def broken(*_: object) -> object:
            raise OSError("no space left on device")

        other = SandboxSpec("process", uid=65_000)  # another spec makes the slot build afresh
        job = job_of(HONEST)
        monkeypatch.setattr(execution, "build", broken)
        failing = Job(**{**job.__dict__, "sandbox": other})
        with pytest.raises(InfrastructureFailure, match="no space left"):
            executor.submit(failing).result(60)
        monkeypatch.setattr(execution, "build", build)
        assert executor.submit(job_of(HONEST)).result(60).training.status is Status.OK

    def test_a_job_can_be_pickled_to_another_node(
        self, executor: Executor, job_of: MakeJob
    ) -> None:
        job = job_of(HONEST)
        carried = pickle.loads(pickle.dumps(job))
        assert carried == job
        result = executor.submit(carried).result(60)
        assert pickle.loads(pickle.dumps(result)) == result


class TestEveryExecutorAtItsEnd:
    def test_closing_with_cancel_kills_what_runs_says_interrupted_and_takes_no_more(
        self, executor: Executor, job_of: MakeJob
    ) -> None:
        assert executor.submit(job_of(HONEST)).result(60).training.status is Status.OK
        job = job_of(SLOW)
        ended: list[BaseException | None] = []
        waiting = threading.Thread(target=lambda: ended.append(executor.submit(job).exception(60)))
        waiting.start()
        time.sleep(1.0)  # by now it sleeps in its sandbox
        executor.close(cancel=True)
        waiting.join(15)
        assert isinstance(ended[0], Interrupted)
        executor.close()
        with pytest.raises(Interrupted):
            executor.submit(job_of(HONEST)).result(10)


def test_what_an_interruption_did_to_a_score_is_not_taken_for_the_candidates_failure(
    job_of: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = SerialExecutor((min(os.sched_getaffinity(0)),))
    verdict = TrainingRun(Status.REJECTED, Reason.MODEL_CODE, "the model server is gone")

    def interrupted_while_scoring(job: Job, *_: object) -> JobResult:
        executor._slot.close()  # as Ctrl-C does, from another thread
        return JobResult(job.job_id, verdict)

    monkeypatch.setattr(scoring, "run_job", interrupted_while_scoring)
    with pytest.raises(Interrupted):
        executor.submit(job_of(HONEST)).result(30)
    executor.close()


def test_slots_share_no_core_and_too_few_cores_are_refused() -> None:
    cores = len(os.sched_getaffinity(0))
    slots = execution.slots(cores, 1)
    assert sorted(core for slot in slots for core in slot) == sorted(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match=f"use workers={cores}"):
        execution.slots(cores + 1, 1)
    with pytest.raises(ValueError, match=f"use sandbox.threads={cores}"):
        execution.slots(1, cores + 1)


def test_two_slots_work_at_the_same_time(job_of: MakeJob) -> None:
    seen: list[str] = []
    cores = sorted(os.sched_getaffinity(0))
    executor = ThreadsExecutor(
        [(cores[0],), (cores[-1],)], SPEC, watch=lambda slot, what: seen.append(f"{slot} {what}")
    )
    while {line[0] for line in seen} != {"0", "1"}:  # until both sandboxes are warm
        executor.submit(job_of(HONEST)).result(60)
    seen.clear()
    futures = [executor.submit(job_of(f"import time\ntime.sleep(2)\n{HONEST}")) for _ in range(2)]
    for future in futures:
        assert future.result(60).training.status is Status.OK
    executor.close()
    assert {line[:5] for line in seen[:2]} == {"0 job", "1 job"}, "both began before one ended"
