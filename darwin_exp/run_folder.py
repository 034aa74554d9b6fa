"""Where a run lives: runs/RUN_ID, found, made and written so that nothing is half there.

Reads: the folder of runs.
Writes: a new run's folder, runs/latest, and whole files.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from darwin_exp.config import ConfigError, as_yaml
from darwin_exp.journal import Journal, JournalError
from darwin_exp.schema import DarwinConfig

LATEST = "latest"


def find_run(runs: Path, name: str) -> Path:
    """Return the folder of a run by its id, or of the newest one started.

    Raises:
        ConfigError: there is none.
    """
    candidate = runs / name
    if candidate.is_dir() and (candidate / "config.yaml").is_file():
        return candidate.resolve()
    known = sorted((path.parent.name for path in runs.glob("*/config.yaml")), reverse=True)
    others = [one for one in known if one != LATEST]
    hint = f"the newest are {', '.join(others[:3])}" if others else "there are none yet"
    raise ConfigError(f"resume={name}: no such run in {runs}; {hint}")


def new_folder(runs: Path) -> Path:
    """Make the folder of a new run, named by the minute and a few random digits.

    Raises:
        ConfigError: it cannot be made there.
    """
    stamp = time.strftime("%y%m%d-%H%M")  # MLflow's tables show the first 16 characters
    while True:
        fresh = runs / f"{stamp}-{secrets.token_hex(2)}"
        try:
            fresh.mkdir(parents=True)
            fresh.chmod(0o700)  # where candidates cannot be given a view of their own
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"paths.runs: {fresh}: {error.strerror}") from error
        return fresh


def point_latest_to(run_folder: Path) -> None:
    """Let runs/latest lead to this run, where the file system knows links."""
    link = run_folder.parent / LATEST
    fresh = run_folder.parent / f".{LATEST}-{os.getpid()}"
    with suppress(OSError):
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(run_folder.name)
        fresh.replace(link)


@contextmanager
def journal_of(run_folder: Path) -> Iterator[Journal]:
    """Open a run's journal as its only writer.

    Raises:
        ConfigError: it is damaged, or another process writes it.
    """
    try:
        journal = Journal(run_folder)
    except JournalError as error:
        raise ConfigError(str(error)) from error
    try:
        yield journal
    finally:
        journal.close()


def write_config(run_folder: Path, config: DarwinConfig) -> None:
    """Write config.yaml, which a resumed run is made from.

    Raises:
        ConfigError: the disk refused it.
    """
    try:
        write_whole(run_folder / "config.yaml", as_yaml(config))
    except OSError as error:
        raise ConfigError(
            f"{run_folder}: {error.strerror}; free some space, then resume"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a power cut leaves the old one or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
