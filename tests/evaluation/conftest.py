"""A real sandbox, a small prepared data set, jobs over both, and what is left out by default."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darwin_exp.individual import (
    DataSpec,
    Evaluation,
    EvaluationSpec,
    Genome,
    Job,
    Purpose,
    SandboxSpec,
    Status,
    TrainingRun,
    TrainingSpec,
)
from darwin_exp.sandbox.process import ProcessSandbox

V, T, N_HELD_OUT = 24, 32, 1921  # 60 windows of 32 tokens and the last target
Score = Callable[..., Evaluation]
MakeJob = Callable[..., Job]


@pytest.fixture(scope="session")
def sandbox() -> Iterator[ProcessSandbox]:
    sandbox = ProcessSandbox(slot=7, cpus=(0,), uid=64_000)
    yield sandbox
    sandbox.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Tokens that mostly follow one another in a circle; even ones stand for two bytes."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    (folder / "held_out").mkdir(mode=0o700)
    for name, n in (("train", 20_000), ("held_out/val", N_HELD_OUT)):
        steps = rng.choice([1, 2, 5], p=[0.7, 0.2, 0.1], size=n)
        (np.cumsum(steps) % V).astype("<u2").tofile(folder / f"{name}.bin")
    np.save(folder / "token_byte_lengths.npy", (2 - np.arange(V) % 2).astype(np.uint16))
    return DataSpec(folder, content_hash="0" * 64, vocab_size=V)


@pytest.fixture
def make_job(data: DataSpec, tmp_path: Path) -> MakeJob:
    """Return a function that builds a job from the text of train.py and model.py."""

    def make(train: str = "", model: str = "", **changes: Any) -> Job:
        evaluation = {"split": "val", "n_prefixes": 48, "batch_tokens": 16 * T, "seconds": 60.0}
        evaluation |= {"verify_rate": False, **changes.pop("evaluation", {})}
        training = {"budget_seconds": 10.0, "max_steps": 3, "seed": 1, "context_length": T}
        training |= changes.pop("training", {})
        fields: dict[str, Any] = {
            "job_id": "job-1",
            "individual_id": "g0s0",
            "purpose": Purpose.SEARCH,
            "genome": Genome.of({"train.py": train, "model.py": model}),
            "data": data,
            "training": TrainingSpec(**_any(training)),
            "sandbox": SandboxSpec("process"),
            "evaluation": EvaluationSpec(**_any(evaluation)),
            "secret": b"the harness alone knows",
            "folder": tmp_path / "job",
        }
        return Job(**(fields | changes))

    return make


def _any(fields: Any) -> Any:
    return fields


@pytest.fixture(scope="session")
def zoo() -> str:
    """The text of a model.py that builds any model of zoo.py by its kind."""
    return zoo_text("zoo")


def zoo_text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")


@pytest.fixture
def score(make_job: MakeJob, sandbox: Any, tmp_path: Path) -> Score:
    """Return a function that saves a model of a zoo and has it scored.

    Its `zoo` names the file that the kind is looked up in, unless `source` gives its text, and
    `weights_seed` draws the first weights, which `change` may do anything to.
    """
    from safetensors.torch import save_file

    from darwin_exp.evaluation.scorer import Scorer

    def run(kind: str, change: Callable[[Any], None] | None = None, **job: Any) -> Evaluation:
        import torch

        source = job.pop("source", None) or zoo_text(job.pop("zoo", "zoo"))
        namespace: dict[str, Any] = {"__name__": "zoo"}
        exec(compile(source, "zoo.py", "exec"), namespace)
        arguments = {"kind": kind, "vocab_size": V}
        torch.manual_seed(job.pop("weights_seed", 3))
        model = namespace["build_model"](arguments)
        if change is not None:
            with torch.no_grad():
                change(model)
        artefacts = tmp_path / "artefacts"
        artefacts.mkdir(exist_ok=True)
        save_file(model.state_dict(), artefacts / "model.safetensors")
        (artefacts / "model.json").write_text(json.dumps(arguments))
        claims = {"training_seconds": 1.0, **job.pop("training_run", {})}
        training = TrainingRun(Status.OK, artefacts=artefacts, **claims)
        return Scorer().evaluate(make_job(**{"model": source, **job}), training, sandbox)

    return run
