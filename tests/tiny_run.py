"""One short training run in the test's own process, laid out as the sandbox lays it out.

Starting an interpreter and importing torch takes longer than training a model this small.
"""

from __future__ import annotations

import gc
import json
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from torch import nn

from darwin_exp.individual import Genome

ROOT = Path(__file__).resolve().parents[1]
T = 16  # context length


def lay_out(
    genome: Genome, folder: Path, tokens: np.ndarray[Any, Any], vocab_size: int, **job: Any
) -> Path:
    """Write a genome, its text and a job of 20 steps below a new folder; return the job's path."""
    genome.write_to(folder / "code")
    (folder / "in").mkdir()
    (folder / "out").mkdir()
    tokens.astype("<u2").tofile(folder / "in" / "train.bin")
    content: dict[str, Any] = {
        "budget_seconds": 600.0,
        "max_steps": 20,
        "seed": 1,
        "device": "cpu",
        "threads": 1,
        "vocab_size": vocab_size,
        "context_length": T,
        "train": "in/train.bin",
        "token_bytes": 2,
        "extra_train": [],
        "out": "out",
    }
    path = folder / "job.json"
    path.write_text(json.dumps(content | job))
    return path


@contextmanager
def code_first(code: Path) -> Iterator[None]:
    """Import from a genome's folder, and forget what was imported from it afterwards."""
    sys.modules.pop("model", None)
    sys.path.insert(0, str(code))
    argv = sys.argv
    try:
        yield
    finally:
        sys.path.remove(str(code))
        sys.modules.pop("model", None)
        sys.argv = argv
        # A trainer may have these its own way, in a process that it believes to be its own.
        gc.enable()
        gc.unfreeze()


def run_train(job: Path) -> dict[str, Any]:
    """Run train.py as the launcher does, beside its own model.py; return the names it defined."""
    code = job.parent / "code"
    with code_first(code):
        sys.argv = ["train.py", str(job)]
        return runpy.run_path(str(code / "train.py"), run_name="__main__")


def rebuilt(folder: Path, names: Mapping[str, Any] | None = None) -> nn.Module:
    """Build the model from what a run left in its folder, as the harness does.

    Args:
        folder: where the run was laid out.
        names: what defines `build_model`; the folder's own model.py where it is left out.
    """
    if names is None:
        with code_first(folder / "code"):
            names = runpy.run_path(str(folder / "code" / "model.py"))
    model = names["build_model"](json.loads((folder / "out" / "model.json").read_text()))
    assert isinstance(model, nn.Module)
    model.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    return model.eval()


def progress_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's progress.jsonl."""
    lines = (folder / "out" / "progress.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
