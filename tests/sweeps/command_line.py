"""Sweeps as they are typed: what the tests of them share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

FILES = {
    "memory": ("memory", ["json", "off"], 5),
    "selection": ("selection", ["truncation", "tournament", "roulette", "nsga2", "random"], 3),
    "mutator": ("mutator", ["operators", "rates", "none"], 3),
    "population": ("+population", ["few_long", "middling", "many_short", "no_evolution"], 3),
}


# --- what is asked for ---------------------------------------------------------------------------
LEAN = [
    "dataset=textdir",
    "dataset.dedup_blocks=false",
    "trainer.context_length=16",
    "trainer.settings.n_layers=1",
    "trainer.settings.n_heads=2",
    "trainer.settings.width=32",
    "trainer.settings.batch_size=4",
    "max_steps=3",
    "budget_seconds=60",
    "base.n_repeats=1",
    "promotion.n_equal_steps=0",
    "eval.n_prefixes=8",
    "integrity.key=00ff",
    "sandbox=process",
    "show=plain",
    "workers=2",
]
Begin = Callable[..., "subprocess.Popen[str]"]


def ended(process: subprocess.Popen[str], seconds: float = 540) -> tuple[int, str]:
    """Wait for a command's end; return its exit code and all that it said."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def sweep_in(place: Path) -> Path:
    """Return the folder of the one sweep below a place."""
    (folder,) = (place / "runs" / "sweeps").iterdir()
    return folder
