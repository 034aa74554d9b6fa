"""The executor's unit: trains one genome in a sandbox, judges how that went, has it scored.

Reads: a Job; the prepared train split and what was added to it; what the sandboxed group leaves in
its output folder.
Writes: train.log, artefacts/ and evaluation.json in the job's folder.
Never: shows a genome more than training text, or takes a number that it printed for a metric.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import time
from enum import Enum
from pathlib import Path
from typing import Any

from darwin_exp.evaluation.checkpoint import (
    CheckpointRefused,
    check_finite,
    read_arguments,
    read_checkpoint,
)
from darwin_exp.individual import Job, JobResult, Reason, Status, TrainingRun
from darwin_exp.protocols import (
    Evaluator,
    Exit,
    InfrastructureFailure,
    Launch,
    Limits,
    Sandbox,
    Zone,
)

CONTENDED_SHARE = 0.1  # of the training time that others may take from a slot
# CPU time that a training may use, by what its slot has in that time and by what the books may be
# off. Where nothing but the kernel's good will ties a process to its CPUs, it can leave them.
CPU_SHARE, CPU_GRACE_SECONDS = 1.1, 1.0
LATE_SECONDS = 5.0  # how long after its budget a training may be stopped, and still count
LOG_TAIL_CHARACTERS = 4_000
PROGRESS_TAIL_BYTES = 64 << 10
CHECKPOINT = ("model.safetensors", "model.json")
PROGRESS = "progress.jsonl"

# Terminal escapes, and every control character but tab and line feed.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def run_job(job: Job, sandbox: Sandbox, evaluator: Evaluator) -> JobResult:
    """Train a genome within its budget and, if that left a checkpoint, have it scored.

    Raises:
        InfrastructureFailure: something of ours failed; nothing is held against the genome.
    """
    started = time.monotonic()
    artefacts = job.folder / "artefacts"
    # An attempt that was lost may have left something behind.
    shutil.rmtree(artefacts, ignore_errors=True)
    artefacts.mkdir(parents=True)
    training = _train(job, sandbox, artefacts)
    evaluation = None
    if training.status is Status.OK and job.evaluation is not None:
        evaluation = evaluator.evaluate(job, training, sandbox)
    delayed = training.run_delay_seconds > CONTENDED_SHARE * training.training_seconds
    result = JobResult(
        job_id=job.job_id,
        training=training,
        evaluation=evaluation,
        total_seconds=time.monotonic() - started,
        # With a fixed number of steps, a slow machine changes nothing but the time it took.
        contended=delayed and job.training.max_steps is None,
    )
    _write_details(job, result)
    return dataclasses.replace(result, total_seconds=time.monotonic() - started)


def _train(job: Job, sandbox: Sandbox, artefacts: Path) -> TrainingRun:
    budget = job.training.budget_seconds
    group = sandbox.start(_launch(job))
    try:
        ended = group.wait(max(0.0, group.ready_at + budget - time.monotonic()))
        # Its main process may have ended and left others that still write.
        group.freeze()
        training_seconds = time.monotonic() - group.ready_at
        late = training_seconds - budget
        if late > LATE_SECONDS:  # this machine was stopped, perhaps, or the sandbox was slow
            raise InfrastructureFailure(f"it was stopped {late:.1f} s after the end of its budget")
        refused = group.collect(
            (*CHECKPOINT, PROGRESS), artefacts, max_bytes=job.training.file_mb << 20
        )
        log, truncated = group.log()
    finally:
        ending = group.close()
    log = _printable(log)
    (job.folder / "train.log").write_text(log, encoding="utf-8")
    status, reason, message = _judge(ended, ending, _find_fault(artefacts, refused, job), log)
    its_share = CPU_SHARE * training_seconds * job.training.threads + CPU_GRACE_SECONDS
    if status is Status.OK and ending.cpu_seconds > its_share:
        status, reason = Status.REJECTED, Reason.RESOURCES
        message = (
            f"it used {ending.cpu_seconds:.1f} s of CPU time in {training_seconds:.1f} s, which is "
            f"more than its {job.training.threads} CPU(s) have"
        )
    step, tokens, loss = read_progress(artefacts / PROGRESS)
    return TrainingRun(
        status=status,
        reason=reason,
        message=message,
        stopped_at_budget=status is Status.OK and not ended,
        startup_seconds=group.startup_seconds,
        training_seconds=training_seconds,
        cpu_seconds=ending.cpu_seconds,
        run_delay_seconds=ending.run_delay_seconds,
        exit_code=ending.code,
        steps_claimed=step,
        tokens_claimed=tokens,
        loss_claimed=loss,
        log_tail=log[-LOG_TAIL_CHARACTERS:],
        log_truncated=truncated,
        artefacts=artefacts if status is Status.OK else None,
    )


def _launch(job: Job) -> Launch:
    spec = job.training
    extra = {f"extra-{place}.bin": file for place, file in enumerate(job.data.extra_train)}
    return Launch(
        name=job.job_id,
        zone=Zone.TRAIN,
        genome=job.genome,
        inputs={"train.bin": job.data.folder / "train.bin", **extra},
        job={
            "budget_seconds": spec.budget_seconds,
            "max_steps": spec.max_steps,
            "seed": spec.seed,
            "device": spec.device,
            "threads": spec.threads,
            "vocab_size": job.data.vocab_size,
            "context_length": spec.context_length,
            "train": "in/train.bin",
            "token_bytes": job.data.token_bytes,
            "extra_train": [f"in/{name}" for name in extra],
            "out": "out",
        },
        limits=Limits(
            startup_seconds=spec.startup_seconds,
            threads=spec.threads,
            memory_mb=spec.memory_mb,
            file_mb=spec.file_mb,
            max_processes=spec.max_processes,
            device=spec.device,
        ),
        labels=job.labels,
    )


# --- judging what was left ------------------------------------------------------------------------

_Verdict = tuple[Status, Reason, str]


def _find_fault(artefacts: Path, refused: dict[str, str], job: Job) -> CheckpointRefused | None:
    """Return what keeps the collected checkpoint from being complete and acceptable, or None."""
    try:
        for name in CHECKPOINT:
            # What was not taken for another reason than being absent was no plain, bounded file.
            if name in refused and refused[name] != os.strerror(errno.ENOENT):
                raise CheckpointRefused(Reason.ARTEFACT, f"{name} was not taken: {refused[name]}")
        read_arguments(artefacts / "model.json")
        checkpoint = read_checkpoint(
            artefacts / "model.safetensors", max_bytes=job.training.file_mb << 20
        )
        check_finite(checkpoint)
    except CheckpointRefused as fault:
        return fault
    return None


def _judge(ended: bool, ending: Exit, fault: CheckpointRefused | None, log: str) -> _Verdict:
    """Say what became of a training run.

    What the harness did comes first, then memory, then the exit code, because a parent may end
    with 0 after its child was killed, and a killed process ends with a signal that is ours.
    """
    if ended and ending.out_of_memory:
        return Status.OUT_OF_MEMORY, Reason.MEMORY, "the run went past its memory limit"
    if ended and ending.code is None:
        raise InfrastructureFailure("the group was ended by neither itself nor its limits")
    if ended and ending.code:
        return _crash(ending.code, log)
    if fault is None:
        return Status.OK, Reason.NONE, ""
    if fault.reason is not Reason.NO_CHECKPOINT:
        return Status.REJECTED, fault.reason, str(fault)
    if ended:
        message = f"the run ended by itself and left no complete checkpoint: {fault}"
        return Status.CRASHED, Reason.NO_CHECKPOINT, message
    message = f"frozen at its budget without a complete checkpoint: {fault}"
    return Status.TIMED_OUT, Reason.NO_CHECKPOINT, message


def _crash(code: int, log: str) -> _Verdict:
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "")
    if code < 0:
        name = signal.strsignal(-code) or f"signal {-code}"
        return Status.CRASHED, Reason.SIGNAL, f"the run was ended by a signal: {name}"
    message = f"the run ended with exit status {code}"
    return Status.CRASHED, Reason.EXCEPTION, f"{message}: {last[:300]}" if last else message


def read_progress(path: Path) -> tuple[int | None, int | None, float | None]:
    """Return step, tokens and loss of the last line that makes sense: claims, each may be None.

    Only the end of the file is read, so that its length costs nothing.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - PROGRESS_TAIL_BYTES))
            lines = file.read(PROGRESS_TAIL_BYTES).split(b"\n")
    except OSError:
        return None, None, None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            step, tokens = _count(entry.get("step")), _count(entry.get("tokens"))
            if step is not None or tokens is not None:
                return step, tokens, _finite(entry.get("loss"))
    return None, None, None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 60 else None


def _finite(value: Any) -> float | None:
    if type(value) is int and abs(value) < 1 << 60:
        value = float(value)
    return value if type(value) is float and math.isfinite(value) else None


def _printable(text: str) -> str:
    """Drop what could steer a terminal; a carriage return starts a line, as it did on screen."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _CONTROLS.sub("", text)
    return text.encode("utf-8", "replace").decode("utf-8")


# --- what people read -----------------------------------------------------------------------------


def _write_details(job: Job, result: JobResult) -> None:
    """Write evaluation.json: how the job went, in full, for people and for the tracking UI."""
    training = dataclasses.asdict(result.training)
    del training["log_tail"], training["artefacts"]
    content = {
        "job_id": job.job_id,
        "individual_id": job.individual_id,
        "purpose": job.purpose,
        "genome": job.genome.id,
        "contended": result.contended,
        "seconds": {"total": result.total_seconds, "overhead": result.overhead_seconds},
        "training": training,
        "evaluation": result.evaluation and dataclasses.asdict(result.evaluation),
    }
    unfinished = job.folder / "evaluation.json.unfinished"
    unfinished.write_text(json.dumps(_plain(content), indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, job.folder / "evaluation.json")


def _plain(value: Any) -> Any:
    """Return what JSON can hold: enums by their value, a number that is none as null."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
