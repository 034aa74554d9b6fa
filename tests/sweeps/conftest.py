"""Sweeps from the command line, each in a folder of its own, over one small text."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from darwin_exp.config import PROJECT
from tests.sweeps.command_line import LEAN, Begin


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(rng.choices(words, k=12_000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def begin(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begin]:
    """Start `python -m darwin_exp ARGUMENTS` with folders in a place; what is left is killed."""
    started: list[subprocess.Popen[str]] = []
    shared = tmp_path_factory.mktemp("shared")

    def begin(place: Path, *arguments: str) -> subprocess.Popen[str]:
        (place / "runs").mkdir(exist_ok=True)
        if not (place / "runs" / ".peaks").exists():  # the machine is measured once for all
            (shared / "peaks").mkdir(exist_ok=True)
            (place / "runs" / ".peaks").symlink_to(shared / "peaks")
        folders = [f"paths.{name}={place / name}" for name in ("runs", "memory")]
        process = subprocess.Popen(
            [sys.executable, "-m", "darwin_exp", *arguments, *LEAN, *folders,
             f"dataset.path={text}", f"paths.data={shared / 'data'}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=PROJECT,
            env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
