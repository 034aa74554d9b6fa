"""Execution: runs pure jobs on slots, each with its own cores and its own sandbox.

Reads: jobs. Writes: their results, into futures.
Never: decides what is run, or remembers anything between jobs but a warm sandbox.

`build` alone turns a picklable spec into a sandbox and an evaluator on the node where a job runs,
so the same job can be carried to another process or machine.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from darwin_exp.individual import Job, JobResult, SandboxSpec
from darwin_exp.protocols import Evaluator, InfrastructureFailure, Interrupted, Sandbox

SlotWatch = Callable[[int, str], None]


def build(
    spec: SandboxSpec, slot: int, cpus: tuple[int, ...], hidden: tuple[Path, ...]
) -> tuple[Sandbox, Evaluator]:
    """Make the sandbox and the evaluator of one slot on this node.

    Args:
        hidden: folders that no candidate may see, where the sandbox can hide them.

    Raises:
        SandboxUnavailable: it cannot work here.
    """
    from darwin_exp.evaluation.scorer import Scorer

    if spec.kind == "docker":
        from darwin_exp.sandbox.docker import DockerSandbox

        return DockerSandbox(slot, cpus, spec), Scorer()
    if spec.kind == "bubblewrap":
        from darwin_exp.sandbox.bubblewrap import BubblewrapSandbox

        return BubblewrapSandbox(slot, cpus, spec.uid, hidden=hidden), Scorer()
    from darwin_exp.sandbox.process import ProcessSandbox

    return ProcessSandbox(slot, cpus, spec.uid, hidden=hidden), Scorer()


def slots(n: int, threads: int) -> list[tuple[int, ...]]:
    """Return the cores of each slot: `threads` each, none shared.

    Raises:
        ValueError: this machine has too few cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if n * threads > len(cores):
        fits = len(cores) // threads
        cure = f"workers={fits}" if fits else f"sandbox.threads={len(cores)}"
        raise ValueError(
            f"workers={n} slots of sandbox.threads={threads} need {n * threads} cores and this "
            f"machine offers {len(cores)}; use {cure}"
        )
    return [tuple(cores[k * threads : (k + 1) * threads]) for k in range(n)]


class _Slot:
    """One place where a job can run; keeps its sandbox warm from job to job."""

    def __init__(
        self, slot: int, cpus: tuple[int, ...], hidden: tuple[Path, ...], watch: SlotWatch
    ) -> None:
        self._slot, self._cpus, self._hidden, self._watch = slot, cpus, hidden, watch
        self._spec: SandboxSpec | None = None
        self._sandbox: Sandbox | None = None
        self._evaluator: Evaluator | None = None
        self._mutex = threading.Lock()
        self._closed = threading.Event()

    def parts_for(self, spec: SandboxSpec) -> tuple[Sandbox, Evaluator]:
        with self._mutex:
            if self._closed.is_set():
                raise Interrupted
            if self._sandbox is None or self._evaluator is None or spec != self._spec:
                if self._sandbox is not None:
                    self._sandbox.close()
                self._sandbox, self._evaluator = build(spec, self._slot, self._cpus, self._hidden)
                self._spec = spec
            if self._closed.is_set():  # while it was being built
                self._sandbox.close()
                raise Interrupted
            return self._sandbox, self._evaluator

    def prepare(self, spec: SandboxSpec) -> None:
        """Start the sandbox ahead of the first job, which will meet and report any failure."""
        with suppress(Exception):
            self.parts_for(spec)[0].warm_up()

    def run(self, job: Job) -> JobResult:
        from darwin_exp.evaluation.job import run_job

        try:
            self._watch(self._slot, job.job_id)
            sandbox, evaluator = self.parts_for(job.sandbox)
            result = run_job(job, sandbox, evaluator)
            if self._closed.is_set():
                raise Interrupted  # what we killed can look like the candidate's own failure
            return result
        except Exception as failure:
            if self._closed.is_set():
                raise Interrupted from failure
            self._discard()
            if isinstance(failure, InfrastructureFailure | Interrupted):
                raise
            # A defect or a full disk on our side is never held against the candidate.
            raise InfrastructureFailure(f"{type(failure).__name__}: {failure}") from failure
        finally:
            self._watch(self._slot, "")

    def _discard(self) -> None:
        """Drop a sandbox that failed, so that the next job starts with a fresh one."""
        with self._mutex:
            sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            with suppress(Exception):
                sandbox.close()

    def close(self) -> None:
        # Not under the mutex: a job that is just running must be killed, not waited for.
        self._closed.set()
        sandbox = self._sandbox
        if sandbox is not None:
            sandbox.close()


class SerialExecutor:
    """Runs each job in the thread that submits it."""

    def __init__(
        self,
        cpus: tuple[int, ...],
        spec: SandboxSpec | None = None,
        hidden: tuple[Path, ...] = (),
        watch: SlotWatch | None = None,
    ) -> None:
        self.n_slots = 1
        self._slot = _Slot(0, cpus, hidden, watch or _ignore)
        self._turn = threading.Lock()
        if spec is not None:
            self._slot.prepare(spec)

    def submit(self, job: Job) -> Future[JobResult]:
        """Run a job and return its finished Future."""
        future: Future[JobResult] = Future()
        with self._turn:
            _settle(future, self._slot, job)
        return future

    def close(self, cancel: bool = False) -> None:
        """Wait for the job that runs, or kill it; then free the slot."""
        if cancel:
            self._slot.close()
        with self._turn:
            self._slot.close()


class ThreadsExecutor:
    """Runs jobs on several slots of this machine; the work itself happens in their sandboxes.

    Args:
        cpus: the cores of each slot.
        spec: the sandbox that is started at once, so that no job has to wait for it.
        hidden: folders that no candidate may see.
        watch: told (slot, job id) when a job begins, and (slot, "") when it has ended.
    """

    def __init__(
        self,
        cpus: Sequence[tuple[int, ...]],
        spec: SandboxSpec | None = None,
        hidden: tuple[Path, ...] = (),
        watch: SlotWatch | None = None,
    ) -> None:
        self.n_slots = len(cpus)
        self._jobs: queue.SimpleQueue[tuple[Job, Future[JobResult]] | None] = queue.SimpleQueue()
        self._closed = False
        self._door = threading.Lock()  # nothing is queued behind the notes that end the threads
        self._slots = [_Slot(k, own, hidden, watch or _ignore) for k, own in enumerate(cpus)]
        self._threads = [
            threading.Thread(
                target=self._serve, args=(slot, own, spec), name=f"slot-{k}", daemon=True
            )
            for k, (slot, own) in enumerate(zip(self._slots, cpus, strict=True))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> Future[JobResult]:
        """Queue a job for the next free slot."""
        future: Future[JobResult] = Future()
        with self._door:
            if self._closed:
                future.set_exception(Interrupted())
            else:
                self._jobs.put((job, future))
        return future

    def close(self, cancel: bool = False) -> None:
        """Finish what is queued, or with `cancel` kill what runs; then end every slot."""
        if cancel:
            for slot in self._slots:
                slot.close()
        with self._door:
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for slot in self._slots:
            slot.close()

    def _serve(self, slot: _Slot, cpus: tuple[int, ...], spec: SandboxSpec | None) -> None:
        # Scoring runs in this thread: on the slot's own cores it disturbs no other slot.
        with suppress(OSError):
            os.sched_setaffinity(0, cpus)
        if spec is not None:
            slot.prepare(spec)
        while (task := self._jobs.get()) is not None:
            job, future = task
            _settle(future, slot, job)


def _settle(future: Future[JobResult], slot: _Slot, job: Job) -> None:
    try:
        future.set_result(slot.run(job))
    except (InfrastructureFailure, Interrupted) as failure:
        future.set_exception(failure)
    except BaseException as failure:  # or whoever waits for this job would wait for ever
        future.set_exception(InfrastructureFailure(f"{type(failure).__name__}: {failure}"))


def _ignore(slot: int, what: str) -> None:
    """Watch nothing."""
