"""Recordings: what models answered and trainings came to, in a file, and a run played from it.

Reads: a run's journal, or a recording that was written from one.
Writes: recordings (JSON lines, compressed where the name ends in .gz).
Never: holds the integrity key, or gives what was recorded for one question or genome to another.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from darwin_exp import journal
from darwin_exp.individual import Job, JobResult, Purpose
from darwin_exp.journal import Divergence
from darwin_exp.protocols import Event
from darwin_exp.trials import result_from

FORMAT = 1
# Decisions that depend on which slot was faster, on what else this machine holds, or on people.
DECISIONS = (
    *("gate", "prompting", "library"),
    *("inbox", "review", "budget", "effect", "withdrawn", "postponed"),
    "environment_abandoned",
)
KINDS = ("llm_answered", "job", "timing", "retimed", *DECISIONS)


class Recording:
    """What a run's models answered and what its jobs came to.

    Args:
        source: where it was read from, for messages.
    """

    def __init__(self, events: Iterable[Event], source: Path) -> None:
        self.source = source
        self._events = {(event.kind, event.key): event for event in events if event.kind in KINDS}

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Read a run's folder, or a file that `write_recording` wrote.

        Raises:
            JournalError: the run's journal is missing or damaged.
            ValueError: the file is no recording, or damaged.
            OSError: it cannot be read.
        """
        if path.is_dir():
            return cls(journal.load(path), path)
        return cls(_read(path), path)

    @property
    def decisions(self) -> list[Event]:
        """What a replay decides as the recorded run did; see `Journal.heed`."""
        return [event for event in self._events.values() if event.kind in DECISIONS]

    def answer(self, key: str) -> Event | None:
        """Return the answer to the question of that key, if one was recorded."""
        return self._events.get(("llm_answered", key))

    def outcome(self, job: Job) -> JobResult:
        """Return what a job came to.

        Raises:
            Divergence: it was not recorded, or with other code or under other conditions.
        """
        kind = "timing" if job.purpose is Purpose.RETIME else "job"
        event = self._events.get((kind, job.job_id))
        if event is None:
            raise Divergence(
                f"{self.source}: no training {job.job_id} is recorded: this run has taken another "
                "course than the recorded one"
            )
        conditions: dict[str, Any] = {
            "genome_id": job.genome.id,
            "split": job.evaluation.split if job.evaluation else None,
            "seed": job.training.seed,
            "max_steps": job.training.max_steps,
        }
        for name, value in conditions.items():
            if event.payload[name] != value:
                raise Divergence(
                    f"{self.source}: training {job.job_id} was recorded with "
                    f"{name}={event.payload[name]!r}, and this run comes to {value!r}"
                )
        return result_from(job.job_id, event.payload, event.measured)


class ReplayExecutor:
    """Gives every job the outcome that was recorded for it; nothing is trained.

    A training that was lost is given back as the loss that it was, not raised again: whether the
    machine was beyond help was decided when it was recorded.
    """

    def __init__(self, recording: Recording, n_slots: int = 1) -> None:
        self.n_slots = n_slots
        self._recording = recording

    def submit(self, job: Job) -> Future[JobResult]:
        """Return a finished Future; it raises Divergence where nothing fits."""
        future: Future[JobResult] = Future()
        try:
            future.set_result(self._recording.outcome(job))
        except Divergence as divergence:
            future.set_exception(divergence)
        return future

    def close(self, cancel: bool = False) -> None:
        """Do nothing: there is nothing that runs."""


def write_recording(events: Sequence[Event], path: Path) -> None:
    """Write what a run can be replayed from; whatever stood there is replaced at once.

    Raises:
        OSError: it cannot be written.
    """
    lines = [_header(events), *(_line(event) for event in events if event.kind in KINDS)]
    content = "".join(f"{line}\n" for line in lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _header(events: Sequence[Event]) -> str:
    """Return the first line, which tells which run this is of."""
    run = next((event for event in events if event.kind == "run"), None)
    told: dict[str, Any] = {"darwin_recording": FORMAT}
    if run is not None:
        # Named one by one: the rest of that event holds the integrity key.
        told["run_id"] = run.measured.get("run_id")
        told["environment_id"] = run.payload.get("environment_id")
        told["base_genome_id"] = run.payload.get("base_genome_id")
    return json.dumps(told)


def _line(event: Event) -> str:
    return json.dumps(
        {
            "sequence": event.sequence,
            "kind": event.kind,
            "key": event.key,
            "payload": event.payload,
            "measured": event.measured,
            "written_at": event.written_at,
        },
        sort_keys=True,
    )


def _read(path: Path) -> Iterator[Event]:
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        lines = content.decode("utf-8").splitlines()
        header = json.loads(lines[0]) if lines else {}
        version = header.get("darwin_recording") if isinstance(header, dict) else None
    except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is no recording, or is damaged: {error}") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} is no recording of this version; llm.mode=record writes one, and a run's "
            "folder serves as well"
        )
    for number, line in enumerate(lines[1:], start=2):
        try:
            yield Event(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is damaged: {error}") from error
