"""Measure what containers cost: seconds per candidate, and training inside against outside.

    python tests/benchmarks/containers.py overhead [--candidates N]
    python tests/benchmarks/containers.py speed [--pairs N] [--steps N] [--trainer NAME]

`overhead` sends candidates of many kinds through one sandbox, with a fake trainer: honest ones,
crashes, floods, hangs, forks, hogs and models that read ahead. What neither trains nor scores is
overhead, start-up included. In the end it asks the engine whether anything of them is left.

`speed` trains the same genome for the same number of steps in a container and in the process
sandbox, turn about, on the same CPU with one thread, and gives the median ratio of the pairs with a
distribution-free interval.

Reads: trainer_base/, conf/trainer/NAME.yaml; a container engine and the images of `make image`.
Writes: temporary folders, removed at the end; a table on standard output.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the attacks' boxes are part of the tests

from darwin_exp.evaluation.job import run_job  # noqa: E402
from darwin_exp.evaluation.scorer import Scorer  # noqa: E402
from darwin_exp.image import base_image, training_image  # noqa: E402
from darwin_exp.individual import (  # noqa: E402
    DataSpec,
    Genome,
    Job,
    JobResult,
    Purpose,
    SandboxSpec,
    TrainingSpec,
)
from darwin_exp.protocols import Sandbox  # noqa: E402
from darwin_exp.sandbox.docker import DockerSandbox  # noqa: E402
from darwin_exp.sandbox.process import ProcessSandbox  # noqa: E402
from tests.attacks import models  # noqa: E402
from tests.attacks.boxes import CLEAN_UP_SECONDS, UID, Box, build, write_data  # noqa: E402
from tests.attacks.outside import RUN, Engine  # noqa: E402

# What a candidate goes on to do once it has trained and saved, and the seconds that it is given.
KINDS: dict[str, tuple[str, str, float]] = {
    "honest": ("", models.HONEST, 30.0),
    "crashes": ("raise SystemExit(3)\n", models.HONEST, 30.0),
    "killed by a signal": ("os.kill(os.getpid(), 11)\n", models.HONEST, 30.0),
    "hangs": ("while True: time.sleep(1)\n", models.HONEST, 1.0),
    "floods its log": ("sys.stdout.write('x' * (10 << 20))\n", models.HONEST, 30.0),
    "forks until it may not": (
        "try:\n    while os.fork(): pass\nexcept OSError: pass\ntime.sleep(60)\n",
        models.HONEST,
        1.0,
    ),
    "takes all memory": ("hog = bytearray(1 << 30)\nhog[::4096] = hog[1::4096]\n", "", 30.0),
    "reads ahead": ("", models.UNMASKED, 30.0),
    "leaves a daemon": (
        "if not os.fork():\n    os.setsid(); time.sleep(60)\n",
        models.HONEST,
        30.0,
    ),
    "leaves nothing": ("for left in out.iterdir(): left.unlink()\n", models.HONEST, 30.0),
}


def overhead(n_candidates: int) -> None:
    """Send candidates of all kinds through one sandbox; print what they cost, and what is left."""
    image = base_image(print)
    costs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_data(folder / "data")
        engine = Engine()
        box = Box("docker", build("docker", image), data, folder, engine=engine, image=image)
        try:
            for k in range(n_candidates):
                kind = list(KINDS)[k % len(KINDS)]
                then, model, seconds = KINDS[kind]
                found = box.run(
                    then, model=model, prefixes=48, training={"budget_seconds": seconds}
                ).result
                costs.setdefault(kind, []).append(_neither_trained_nor_scored(found))
                print(f"{k + 1:3d}  {kind:24s} {found.outcome.status.value:14s}", flush=True)
            # The records of the last container may be just being removed.
            deadline = time.monotonic() + CLEAN_UP_SECONDS
            while (left := box.traces()) and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            box.close()
    every = [cost for of_kind in costs.values() for cost in of_kind]
    print(f"\n{'kind':24s}  median  max   (seconds that neither train nor score)")
    for kind, seconds_of in [*costs.items(), ("all", every)]:
        print(f"{kind:24s}  {statistics.median(seconds_of):6.2f}  {max(seconds_of):.2f}")
    print(f"left of {n_candidates} candidates: {', '.join(left) or 'nothing'}")


def _neither_trained_nor_scored(result: JobResult) -> float:
    scored = result.evaluation
    useful = result.training.training_seconds + (scored.scoring_seconds if scored else 0.0)
    return result.total_seconds - useful


def speed(n_pairs: int, steps: int, trainer: str) -> None:
    """Train in pairs, inside and outside, and print the ratio of their training times."""
    image = training_image(print)[1]
    cpus = (max(os.sched_getaffinity(0)),)
    loaded: Any = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/trainer/{trainer}.yaml"))
    texts = {name: (ROOT / "trainer_base" / name).read_text() for name in ("train.py", "model.py")}
    genome = Genome.of({**texts, "settings.json": json.dumps(loaded["settings"])})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokens = np.random.default_rng(0).integers(80, size=1_000_000)
        tokens.astype("<u2").tofile(folder / "train.bin")
        spec = SandboxSpec("docker", image=image)
        inside: Sandbox = DockerSandbox(0, cpus, spec, run=RUN)
        outside: Sandbox = ProcessSandbox(0, cpus, UID)
        job = Job(
            job_id="job",
            individual_id="g00-i00",
            purpose=Purpose.RETIME,
            genome=genome,
            data=DataSpec(folder, "0" * 64, 80),
            training=TrainingSpec(600.0, steps, 0, loaded["context_length"]),
            sandbox=spec,
            evaluation=None,
            secret=b"",
            folder=folder,
            run_id=RUN,
        )
        ratios: list[float] = []
        try:
            for k in range(-1, n_pairs):  # the first warms up
                seconds = {}
                for name, box in [("inside", inside), ("outside", outside)][:: 1 - 2 * (k % 2)]:
                    trained = run_job(
                        replace(job, job_id=f"{name}-{k}", folder=folder / f"{name}-{k}"),
                        box,
                        Scorer(),
                    ).training
                    assert trained.steps_claimed == steps, trained
                    seconds[name] = trained.training_seconds
                ratio = seconds["inside"] / seconds["outside"]
                ratios += [ratio] if k >= 0 else []
                which = f"pair {k + 1:2d}" if k >= 0 else "warm-up"
                times = "  ".join(f"{name} {took:.2f} s" for name, took in sorted(seconds.items()))
                print(f"{which}  {times}  ratio {ratio:.3f}", flush=True)
        finally:
            inside.close()
            outside.close()
    low, high, level = median_interval(ratios)
    print(
        f"{trainer}, {steps} steps, one thread: inside takes {statistics.median(ratios):.3f} times "
        f"as long as outside ({100 * level:.0f} % interval {low:.3f} to {high:.3f}, "
        f"{len(ratios)} pairs)"
    )


def median_interval(values: list[float], wanted: float = 0.95) -> tuple[float, float, float]:
    """Return the tightest pair of order statistics that holds the median so surely, and how surely.

    Source: the sign test; how many values lie below the median is binomial with one half.
    """
    ordered, n = sorted(values), len(values)
    below = [math.comb(n, k) / 2**n for k in range(n + 1)]
    for k in reversed(range(n // 2)):
        level = 1.0 - 2.0 * sum(below[: k + 1])
        if level >= wanted:
            return ordered[k], ordered[n - 1 - k], level
    return ordered[0], ordered[-1], 1.0 - 2.0 * below[0]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    what = parser.add_subparsers(dest="what", required=True)
    costs = what.add_parser("overhead", help="seconds per candidate, and what is left")
    costs.add_argument("--candidates", type=int, default=50)
    pairs = what.add_parser("speed", help="training inside against outside")
    pairs.add_argument("--pairs", type=int, default=12)
    pairs.add_argument("--steps", type=int, default=150)
    pairs.add_argument("--trainer", default="baseline")
    options = parser.parse_args()
    if options.what == "overhead":
        overhead(options.candidates)
    else:
        speed(options.pairs, options.steps, options.trainer)


if __name__ == "__main__":
    main()
