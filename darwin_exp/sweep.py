"""A sweep's folder: which jobs it has, which runs they became, and what is left to do.

Reads: sweep.json and runs.jsonl in runs/sweeps/SWEEP_ID/, and the journals of its runs.
Writes: those two files.
Never: knows how a command line becomes jobs, or runs one.

A job is known by the overrides that tell it apart, in any order, so that the same command typed
again finds its runs. What a run is worth is asked of its journal, never noted down a second time:
a process that was killed leaves nothing to contradict it.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from darwin_exp.config import ConfigError
from darwin_exp.journal import FILE_NAME, JournalError, load

LATEST = "latest"
PLAN, RUNS = "sweep.json", "runs.jsonl"
Overrides = frozenset[str]


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do.

    Attributes:
        name: of its file in sweeps/, else the keys that it varies.
        command: the command line, for people.
        jobs: of each, the overrides that tell it apart.
        varied: the keys that take more than one value.
    """

    name: str
    command: str
    jobs: tuple[Overrides, ...]
    varied: tuple[str, ...]

    def label(self, job: Overrides) -> str:
        """Return a job's own values, in the order in which the keys were typed."""
        own = {override.partition("=")[0]: override for override in job}
        shown = [own[key].removeprefix("+") for key in self.varied if key in own]
        return " ".join(shown) or "the only job"


@dataclass(frozen=True)
class Member:
    """A run of a sweep, and what it was started with."""

    run_folder: Path
    job: Overrides


def new_or_named(runs: Path, name: str | None) -> Path:
    """Return a sweep's folder: a new one's, or that of a name or of the latest, there or not."""
    sweeps = runs / "sweeps"
    if name == LATEST:
        known = _known(sweeps)
        return known[0] if known else sweeps / LATEST
    if name is not None:
        return sweeps / name
    stamp = time.strftime("%y%m%d-%H%M%S")
    # Two that are started in one second get two folders.
    return sweeps / f"{stamp}-{secrets.token_hex(2)}"


def find(runs: Path, name: str) -> Path:
    """Return the folder of a sweep by its id, or of the one that was last worked at.

    Raises:
        ConfigError: there is none.
    """
    folder = new_or_named(runs, name)
    if (folder / PLAN).is_file():
        return folder
    others = ", ".join(known.name for known in _known(runs / "sweeps")[:3])
    hint = f"the newest are {others}" if others else "there are none yet"
    raise ConfigError(f"sweep={name}: no such sweep in {runs / 'sweeps'}; {hint}")


def _known(sweeps: Path) -> list[Path]:
    plans = sorted(sweeps.glob(f"*/{PLAN}"), key=lambda path: path.stat().st_mtime_ns)
    return [path.parent for path in reversed(plans)]


def read_plan(folder: Path) -> Plan | None:
    """Return what a sweep is to do; None where that was not written or cannot be read."""
    try:
        told: dict[str, Any] = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        jobs = tuple(frozenset(map(str, job)) for job in told["jobs"])
        return Plan(str(told["name"]), str(told["command"]), jobs, tuple(told["varied"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


class Sweep:
    """A sweep that this process works at; nobody else can at the same time.

    Args:
        folder: of the sweep, whether it is there or not.
        plan: what is to be done.

    Raises:
        ConfigError: another process works at it, it has other jobs, or it cannot be written.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder / "sweep.lock")
            try:
                self._refuse_other_jobs()
                _write(folder / PLAN, _as_json(plan))
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise ConfigError(
                f"{folder}: {error.strerror}; choose another folder with paths.runs=FOLDER"
            ) from error

    @property
    def id(self) -> str:
        return self.folder.name

    def _refuse_other_jobs(self) -> None:
        """Refuse to go on with fewer or other jobs than the sweep has; more may join."""
        before = read_plan(self.folder)
        if before is None:
            if (self.folder / PLAN).exists():
                raise ConfigError(
                    f"{self.folder / PLAN} is damaged, and says no more which jobs the sweep has; "
                    "delete it to go on with the jobs of this command"
                )
            return
        left_out = [job for job in before.jobs if job not in self.plan.jobs]
        if left_out:
            raise ConfigError(
                f"sweep={self.id}: {len(left_out)} of its {len(before.jobs)} jobs, such as "
                f"{before.label(left_out[0])}, are not among those of this command; type the same "
                f"command, or one that adds seeds or settings to it: {before.command}"
            )

    def run_of(self, job: Overrides) -> Path | None:
        """Return the folder of the newest run that a job became; None where it has none."""
        ours = [one.run_folder for one in members(self.folder) if one.job == job]
        return ours[-1] if ours else None

    def discard_if_unused(self) -> None:
        """Remove the folder of a sweep that never had a run: its command was mistyped."""
        if not (self.folder / RUNS).exists():
            for name in (PLAN, "sweep.lock", "multirun.yaml"):
                (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # somebody has put something else there
                self.folder.rmdir()

    def close(self) -> None:
        """Let others work at it. Idempotent."""
        self._lock.close()


def enlist(folder: Path, run_folder: Path, command: str, job: Overrides) -> None:
    """Append a run to its sweep's list, one JSON object a line.

    Raises:
        ConfigError: it could not be written; unlisted, the run would be lost to its sweep.
    """
    line = {
        "run_id": run_folder.name,
        "folder": os.path.relpath(run_folder, folder),
        "job": sorted(job),
        "command": command,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / RUNS).open("a", encoding="utf-8") as file:
            # A crash may have left half a line, with which this one must not run together.
            file.write("\n" + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{folder / RUNS}: {error.strerror}") from error


def members(folder: Path) -> list[Member]:
    """Return a sweep's runs, oldest first.

    A line that was cut off by a crash, and a run that somebody has deleted, are passed over.
    """
    try:
        lines = (folder / RUNS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            told = json.loads(line)
            run_folder = (folder / told["folder"]).resolve()
            job = frozenset(map(str, told["job"]))
        except (ValueError, KeyError, TypeError):
            continue
        # Without a journal nothing of it can be gone on with.
        if (run_folder / "config.yaml").is_file() and (run_folder / FILE_NAME).is_file():
            found.append(Member(run_folder, job))
    return found


def exit_code_of(run_folder: Path) -> int | None:
    """Return the exit code of a run that was finished; None while there is something to resume.

    Raises:
        ConfigError: its journal is damaged.
    """
    try:
        events = load(run_folder)
    except JournalError as error:
        raise ConfigError(str(error)) from error
    last = next((one for one in reversed(events) if one.kind in ("end", "session")), None)
    if last is None or last.kind != "end" or last.payload["status"] != "finished":
        return None
    return int(last.payload["exit_code"])


def _as_json(plan: Plan) -> str:
    told = {**asdict(plan), "jobs": [sorted(job) for job in plan.jobs]}
    return json.dumps(told, indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def _lock(path: Path) -> TextIO:
    """Take the kernel's lock on a file; it is released however this process ends."""
    handle = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise ConfigError(
            f"sweep={path.parent.name} is being run by another process; wait for it or stop it"
        ) from error
    return handle
