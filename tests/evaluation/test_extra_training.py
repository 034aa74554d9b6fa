"""Extra training text reaches the trainer, and nothing else changes (G4)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darwin_exp.evaluation.job import run_job
from darwin_exp.evaluation.scorer import Scorer
from darwin_exp.individual import DataSpec, Evaluation, Genome, Job, Reason, Status
from darwin_exp.protocols import InfrastructureFailure

MakeJob = Callable[..., Job]
V, T = 24, 32
BASE = Path(__file__).parents[2] / "trainer_base"
TINY: dict[str, Any] = {
    "n_layers": 1,
    "n_heads": 1,
    "width": 16,
    "dropout": 0.0,
    "bias": False,
    "tied_head": True,
    "batch_size": 4,
    "accumulation_steps": 1,
    "learning_rate": 1e-2,
    "final_rate_fraction": 0.1,
    "warmup_fraction": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "gradient_clip": 1.0,
    "precision": "float32",
    "compile": False,
}
TOLD = "\nprint('told', job['extra_train'], 'holds', tokens.tolist())\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two extra texts: the first three times 7, the second forty times 9."""
    paths = (tmp_path / "a" / "train.bin", tmp_path / "b" / "train.bin")
    for path, token, n in zip(paths, (7, 9), (3, 40), strict=True):
        path.parent.mkdir()
        np.full(n, token, dtype="<u2").tofile(path)
    return paths


@pytest.fixture
def short(data: DataSpec, tmp_path: Path) -> DataSpec:
    """The same data set with a train split that is shorter than one window."""
    folder = tmp_path / "short"
    folder.mkdir()
    for path in data.folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "train.bin").unlink()
    (np.arange(20) % V).astype("<u2").tofile(folder / "train.bin")
    return replace(data, folder=folder)


def of_the_base(make_job: MakeJob, data: DataSpec, then: str = "") -> Job:
    genome = Genome.from_folder(BASE).with_files({"settings.json": json.dumps(TINY)})
    if then:
        genome = genome.with_files({"train.py": genome.as_dict["train.py"] + then})
    return replace(make_job(training={"budget_seconds": 20.0}), genome=genome, data=data)


def test_g4_the_base_trains_on_an_extra_text_and_is_scored_on_the_same_val(
    make_job: MakeJob, sandbox: Any, short: DataSpec, files: tuple[Path, Path]
) -> None:
    """What the run has is less than a window: so whatever is trained on is the extra text."""
    held_out = short.folder / "held_out" / "val.bin"
    before = held_out.read_bytes()
    job = of_the_base(make_job, replace(short, extra_train=files), TOLD)
    found = run_job(job, sandbox, Scorer())
    assert (found.training.status, found.training.message) == (Status.OK, "")
    joined = [*range(20), *[7] * 3, *[9] * 40]
    told = f"told {['in/extra-0.bin', 'in/extra-1.bin']} holds {joined}"
    assert told in found.training.log_tail
    assert isinstance(found.evaluation, Evaluation)
    assert found.evaluation.status is Status.OK
    assert held_out.read_bytes() == before


def test_g4_control_without_the_extra_text_the_same_genome_has_nothing_to_train_on(
    make_job: MakeJob, sandbox: Any, short: DataSpec
) -> None:
    found = run_job(of_the_base(make_job, short), sandbox, Scorer())
    assert (found.training.status, found.training.reason) == (Status.CRASHED, Reason.EXCEPTION)
    assert "train: 20 tokens, but one window takes 33" in found.training.message


def test_g4_a_genome_cannot_change_an_extra_text(
    make_job: MakeJob, sandbox: Any, short: DataSpec, files: tuple[Path, Path]
) -> None:
    spoil = (
        "\nfor path in (folder / 'in').iterdir():\n"
        "    for change in (path.write_bytes, lambda _: path.unlink()):\n"
        "        try:\n            change(b'')\n"
        "        except OSError as error:\n            print('kept', path.name)\n"
    )
    before = [path.read_bytes() for path in files]
    job = of_the_base(make_job, replace(short, extra_train=files), spoil)
    found = run_job(replace(job, evaluation=None), sandbox, Scorer())
    assert found.training.log_tail.count("kept extra-") == 4
    assert [path.read_bytes() for path in files] == before


def test_an_extra_text_that_is_gone_is_held_against_nobody(
    make_job: MakeJob, sandbox: Any, short: DataSpec, files: tuple[Path, Path]
) -> None:
    files[1].unlink()
    job = of_the_base(make_job, replace(short, extra_train=files))
    with pytest.raises(InfrastructureFailure, match="cannot prepare a launch"):
        run_job(job, sandbox, Scorer())
