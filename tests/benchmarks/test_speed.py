"""What the harness itself costs: `make bench` prints the table."""

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from darwin_exp.evaluation.likelihood import negative_log_likelihood
from darwin_exp.individual import Genome, Individual
from darwin_exp.journal import Journal, load
from darwin_exp.mutation import Operators
from darwin_exp.protocols import EditRequest, Launch, Limits, SandboxUnavailable, Zone
from darwin_exp.sandbox.bubblewrap import BubblewrapSandbox
from darwin_exp.sandbox.process import ProcessSandbox

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base() -> Genome:
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/trainer/baseline.yaml"))
    assert isinstance(settings, dict)
    import json

    genome = Genome.from_folder(ROOT / "trainer_base")
    return genome.with_files({"settings.json": json.dumps(settings["settings"])})


def test_one_event_into_the_journal(benchmark: Any, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    numbers = iter(range(10**9))
    benchmark(lambda: journal.append("step", str(next(numbers)), {"text": "x" * 2000}))
    journal.close()


def test_reading_ten_thousand_events(benchmark: Any, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal._database.execute("PRAGMA synchronous=OFF")
    for n in range(10_000):
        journal.append("step", str(n), {"text": "x" * 200})
    journal.close()
    assert len(benchmark.pedantic(lambda: load(tmp_path), rounds=3)) == 10_000


def test_one_proposal_of_built_in_edits(benchmark: Any, base: Genome) -> None:
    parent = Individual("g00-i00", 0, 0, base)
    mutator, seeds = Operators(), iter(range(10**9))
    request = EditRequest(parent, parent)
    benchmark(lambda: mutator.propose(request, Random(next(seeds))))


def test_scoring_a_batch_of_8192_tokens(benchmark: Any) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(128, 64, 80)).astype(np.float32)
    targets = rng.integers(80, size=(128, 64)).astype(np.int32)
    benchmark(negative_log_likelihood, logits, targets)


@pytest.mark.parametrize("kind", ["process", "bubblewrap"])
def test_starting_and_ending_a_sandboxed_program(
    benchmark: Any, base: Genome, kind: str, tmp_path: Path
) -> None:
    genome = base.with_files({"train.py": "print('ready')\n"})
    try:
        sandbox: Any = (
            ProcessSandbox(0, (0,), 64_000) if kind == "process" else BubblewrapSandbox(0, (0,))
        )
    except SandboxUnavailable as missing:
        pytest.skip(str(missing))
    launch = Launch("bench", Zone.TRAIN, genome, {}, {"threads": 1}, Limits())
    starts: list[float] = []

    def start_and_end() -> None:
        group = sandbox.start(launch)
        starts.append(group.startup_seconds)
        group.wait(30)
        group.close()

    benchmark.pedantic(start_and_end, rounds=15, warmup_rounds=2)
    sandbox.close()
    benchmark.extra_info["median start-up seconds"] = float(np.median(starts))
    (tmp_path / "starts.txt").write_text(str(starts))
