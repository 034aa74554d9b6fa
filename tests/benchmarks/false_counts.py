"""Measure what a false count of tokens gains: MFU beside that of an honest twin.

    python tests/benchmarks/false_counts.py [--pairs N] [--seconds S] [--trainer NAME]

Both train the same model on random text, for so many seconds in the process sandbox, one after the
other on the same CPU; one of them says that it trained on more tokens than it did. Both are scored
as in a search, and then timed again as a closing does it.

Reads: trainer_base/, conf/trainer/NAME.yaml.
Writes: a temporary folder, removed at the end; a table on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from darwin_exp.closing import LONG_SHARE, RETIMINGS, retimed
from darwin_exp.evaluation.job import run_job
from darwin_exp.evaluation.scorer import Scorer
from darwin_exp.individual import (
    DataSpec,
    EvaluationSpec,
    Genome,
    Job,
    JobResult,
    Purpose,
    SandboxSpec,
    TrainingSpec,
)
from darwin_exp.sandbox.process import ProcessSandbox

ROOT = Path(__file__).resolve().parents[2]
V, UID = 80, 64_000
FACTORS = (1.0, 1.3, 2.0)  # of the tokens that were trained on
COUNTED = '"tokens": step'


def write_data(folder: Path) -> DataSpec:
    """Write random text, of which a model learns no more than how often each token comes."""
    rng = np.random.default_rng(0)
    (folder / "held_out").mkdir(parents=True, mode=0o700)
    for name, n in (("train", 1_000_000), ("held_out/val", 30_000)):
        rng.integers(V, size=n).astype("<u2").tofile(folder / f"{name}.bin")
    np.save(folder / "token_byte_lengths.npy", np.ones(V, dtype=np.uint16))
    return DataSpec(folder, "0" * 64, V)


def job_of(factor: float, trainer: Any, data: DataSpec, folder: Path, seconds: float) -> Job:
    """Return the job of a genome that counts so many times its tokens."""
    texts = {name: (ROOT / "trainer_base" / name).read_text() for name in ("train.py", "model.py")}
    assert COUNTED in texts["train.py"], "train.py reports its tokens in another way now"
    counted = f'"tokens": {round(10 * factor)} * step // 10'
    texts["train.py"] = texts["train.py"].replace(COUNTED, counted)
    return Job(
        job_id="job",
        individual_id="g01-i00",
        purpose=Purpose.SEARCH,
        genome=Genome.of({**texts, "settings.json": json.dumps(trainer["settings"])}),
        data=data,
        training=TrainingSpec(seconds, None, 0, trainer["context_length"]),
        sandbox=SandboxSpec("process"),
        evaluation=EvaluationSpec("val", max_logits_bytes=1 << 22, n_prefixes=64, peak_flops=1e15),
        secret=os.urandom(16),
        folder=folder,
    )


def timed_again(searched: JobResult, job: Job, sandbox: ProcessSandbox) -> float | None:
    """Return MFU as a closing finds it, or None where the count is not believed."""
    steps = searched.training.steps_claimed or 0
    runs: list[JobResult] = []
    for name, share, fewest in RETIMINGS:
        spec = job.evaluation
        assert spec is not None
        before = [(run.training.tokens_claimed or 0, run.training.training_seconds) for run in runs]
        examined = replace(
            spec,
            n_prefixes=0,
            second_pass=0.0,
            max_logits_bytes=1,
            shorter_run=before[0] if before else None,
        )
        again = replace(
            job,
            purpose=Purpose.RETIME,
            training=replace(job.training, max_steps=max(fewest, round(share * steps))),
            evaluation=examined if share == LONG_SHARE else None,
            folder=job.folder / name,
        )
        runs.append(run_job(again, sandbox, Scorer()))
    mfu: float | None = retimed([runs]).get("mfu")
    return mfu


def main() -> None:
    """Run the twins and print what each count gained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--trainer", default="baseline")
    options = parser.parse_args()
    loaded: Any = OmegaConf.load(ROOT / "conf" / "trainer" / f"{options.trainer}.yaml")
    trainer = OmegaConf.to_container(loaded)
    gains: dict[tuple[float, str], list[float | None]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        data = write_data(folder / "data")
        sandbox = ProcessSandbox(0, (max(os.sched_getaffinity(0)),), UID)
        try:
            for k in range(options.pairs):
                found: dict[float, tuple[float | None, float | None]] = {}
                for factor in FACTORS[:: 1 - 2 * (k % 2)]:
                    job = job_of(factor, trainer, data, folder / f"{k}-{factor}", options.seconds)
                    result = run_job(job, sandbox, Scorer())
                    assert result.evaluation is not None, result.training
                    believed = result.evaluation.rates.get("mfu")
                    found[factor] = believed, timed_again(result, job, sandbox)
                print(f"round {k + 1}: " + ", ".join(f"x {f}: {found[f]}" for f in FACTORS))
                for factor in FACTORS[1:]:
                    for at, when in enumerate(("in the search", "timed again")):
                        mine, twins = found[factor][at], found[1.0][at]
                        gain = None if mine is None or twins is None else mine / twins - 1
                        gains.setdefault((factor, when), []).append(gain)
        finally:
            sandbox.close()
    for (factor, when), values in gains.items():
        some = [value for value in values if value is not None]
        gained = f"median gain {100 * statistics.median(some):+.1f} %" if some else "no gain"
        print(
            f"{factor} times its tokens, {when}: {gained}; not believed in "
            f"{len(values) - len(some)} of {len(values)}"
        )


if __name__ == "__main__":
    main()
