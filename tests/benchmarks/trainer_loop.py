"""Measure what the base trainer's loop costs over a bare loop on the same modules.

    python tests/benchmarks/trainer_loop.py [--trainer NAME] [--threads N] [--steps N] [--pairs N]

Both sides of a pair do the same number of optimizer steps on the same model, in one process and
one after the other, in alternating order. The trainer's side is the whole of `train.py`: reading
the job, drawing batches, the schedule, the clock, checkpoints and reports. The bare side is
forward, backward, clip and step, on batches drawn beforehand. CPU seconds are compared, because
they suffer least from whatever else the machine is doing.

Reads: trainer_base/, conf/trainer/NAME.yaml.
Writes: a temporary folder, removed at the end; a table on standard output.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import argparse
import contextlib
import io
import json
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 84
N_TOKENS = 1_000_000


@dataclass(frozen=True)
class Cost:
    """What one side of a pair took, in seconds."""

    wall: float
    cpu: float


def timed(work: Callable[[], object]) -> Cost:
    """Run something once and return what it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def prepare(folder: Path, trainer: Mapping[str, Any], steps: int, threads: int) -> Path:
    """Write a genome, random tokens and a job into a folder; return the job's path."""
    for name in ("train.py", "model.py"):
        (folder / name).write_text((ROOT / "trainer_base" / name).read_text())
    (folder / "settings.json").write_text(json.dumps(trainer["settings"]))
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=N_TOKENS)
    tokens.astype("<u2").tofile(folder / "train.bin")
    (folder / "out").mkdir()
    job = {
        "budget_seconds": 3600.0,
        "max_steps": steps,
        "seed": 0,
        "device": "cpu",
        "threads": threads,
        "vocab_size": VOCAB_SIZE,
        "context_length": trainer["context_length"],
        "train": "train.bin",
        "token_bytes": 2,
        "extra_train": [],
        "out": "out",
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


def run_trainer(job: Path) -> dict[str, Any]:
    """Run train.py as the launcher does, and return the names it defined."""
    sys.argv = ["train.py", str(job)]
    with contextlib.redirect_stdout(io.StringIO()):
        return runpy.run_path(str(job.with_name("train.py")), run_name="__main__")


def bare_loop(trained: Mapping[str, Any], steps: int) -> Callable[[], None]:
    """Prepare the least that trains the same model: no clock, no schedule, no data, no files."""
    model = trained["build_model"](trained["arguments"])
    optimizer = trained["build_optimizer"](model)
    parameters = list(model.parameters())
    settings = trained["settings"]
    n_batches = steps * settings.accumulation_steps
    batches = [trained["next_batch"]() for _ in range(n_batches)]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16")

    def run() -> None:
        at = 0
        for _ in range(steps):
            for _ in range(settings.accumulation_steps):
                inputs, targets = batches[at]
                at += 1
                with autocast:
                    logits = model(inputs)
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
                loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()

    return run


def main() -> None:
    """Run the pairs and print their costs, step times and rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trainer", default="nanogpt_cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()

    loaded = OmegaConf.load(ROOT / "conf" / "trainer" / f"{options.trainer}.yaml")
    trainer: Any = OmegaConf.to_container(loaded)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = prepare(folder, trainer, options.steps, options.threads)
        sys.path.insert(0, temporary)
        trained = run_trainer(job)  # warms up caches and allocator, and lends its functions
        ours: list[Cost] = []
        bare: list[Cost] = []
        for pair in range(options.pairs):
            loop = bare_loop(trained, options.steps)
            sides = [(ours, lambda: run_trainer(job)), (bare, loop)]
            for costs, work in sides if pair % 2 else reversed(sides):
                costs.append(timed(work))

    tokens = trainer["context_length"] * trained["settings"].batch_size * options.steps
    tokens *= trained["settings"].accumulation_steps
    print(f"{options.trainer}, {options.threads} thread(s), {options.steps} steps a side")
    for name, costs in (("train.py", ours), ("bare loop", bare)):
        walls = [cost.wall for cost in costs]
        wall, cpu = statistics.median(walls), statistics.median(cost.cpu for cost in costs)
        print(
            f"{name:10s} {1000 * wall / options.steps:7.2f} ms a step"
            f" ({1000 * min(walls) / options.steps:.2f} to {1000 * max(walls) / options.steps:.2f})"
            f", {1000 * cpu / options.steps:.2f} CPU ms, {tokens / wall:,.0f} tokens/s"
        )
    for name in ("cpu", "wall"):
        ratios = [getattr(a, name) / getattr(b, name) - 1 for a, b in zip(ours, bare, strict=True)]
        print(
            f"the trainer costs {100 * statistics.median(ratios):+.1f} % {name} seconds"
            f" (pairs: {', '.join(f'{100 * ratio:+.1f}' for ratio in ratios)})"
        )


if __name__ == "__main__":
    main()
