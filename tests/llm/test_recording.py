"""A recorded run is played again without a server or a training, and comes to the same journal."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.individual import (
    DataSpec,
    Evaluation,
    EvaluationSpec,
    Genome,
    Job,
    JobResult,
    Purpose,
    Reason,
    SandboxSpec,
    Status,
    TrainingRun,
    TrainingSpec,
)
from darwin_exp.journal import Divergence, Journal, comparable, load
from darwin_exp.llm import Recording, ReplayExecutor, write_recording
from darwin_exp.protocols import Executor, InfrastructureFailure
from darwin_exp.trials import Bench, Trial, Trials
from tests.llm.asking import FINE, KEY, Run, Say, Server, completion

INTEGRITY_KEY = "c0ffee" * 8
GENOME = Genome.of({"train.py": "pass\n"})
OTHER = Genome.of({"train.py": "print('other')\n"})


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def named(path: Path, name: str = "recording.jsonl") -> Path:
    return path / "kept" / name


# --- answers ------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, str]:
    """A run with two answers, one after a failure and one that was cut off, and its endpoint."""
    script = [Say(503, ""), FINE, Say(body=completion("half of", "length"))]
    folder = fresh(tmp_path / "recorded")
    with Server(script) as server, Run(folder, server.url) as run:
        run.journal.append("session", "0", {"what": "started"})
        run.journal.append(
            "run",
            "run",
            {
                "base_genome_id": GENOME.id,
                "environment_id": "e1",
                "integrity_key": INTEGRITY_KEY,
                "config": {"integrity.key": INTEGRITY_KEY},
            },
            {"run_id": "250101-0000-abcd"},
        )
        run.ask()
        run.ask("g01-i02/0/0", "Rewrite that.\nAll of it.")
        return folder, server.url


@pytest.mark.parametrize("form", ["folder", "recording.jsonl", "recording.jsonl.gz"])
def test_replay_gives_the_recorded_answers_without_a_server(
    tmp_path: Path, recorded: tuple[Path, str], form: str
) -> None:
    folder, url = recorded
    source = folder
    if form != "folder":
        source = named(tmp_path, form)
        write_recording(load(folder), source)
    with Run(fresh(tmp_path / "replay"), url, recording=Recording.read(source)) as replay:
        assert replay.ask().text == "fine"
        assert replay.ask("g01-i02/0/0", "Rewrite that.\nAll of it.").text == "half of"
        assert replay.ask().text == "fine"
        before = [event for event in comparable(load(folder)) if event[0] == "llm_answered"]
        assert comparable(replay.journal.events()) == before
        assert replay.money.spent.tokens == 30


def test_replay_stops_at_the_first_divergence_and_says_which(
    tmp_path: Path, recorded: tuple[Path, str]
) -> None:
    folder, url = recorded
    with Run(fresh(tmp_path / "replay"), url, recording=Recording.read(folder)) as replay:
        with pytest.raises(
            Divergence,
            match=r"g01-i02/0/0 .*\(\w{16}, and here \w{16}\); the first difference: message 2, "
            r"line 2: 'All of it.', and here 'None of it.'",
        ):
            replay.ask("g01-i02/0/0", "Rewrite that.\nNone of it.")
        with pytest.raises(Divergence, match=r"message 2, line 3: nothing, and here 'Or"):
            replay.ask("g01-i02/0/0", "Rewrite that.\nAll of it.\nOr more.")
        with pytest.raises(Divergence, match="max_tokens 50, and here 60"):
            replay.ask(max_tokens=60)
        with pytest.raises(Divergence, match="the schema of the answer has changed"):
            replay.ask(schema=None)
        with pytest.raises(Divergence, match="no answer to g07-i07/0/0 is recorded"):
            replay.ask("g07-i07/0/0")
        assert replay.of_kind("llm_answered") == []
    told = pytest.raises(Divergence, match="the first difference: model ")
    warm = Run(fresh(tmp_path / "warm"), url, temperature=1.0, recording=Recording.read(folder))
    with warm as warmer, told:
        warmer.ask()


def test_a_recording_says_whose_it_is_and_never_holds_the_integrity_key(
    tmp_path: Path, recorded: tuple[Path, str]
) -> None:
    folder, _ = recorded
    path = named(tmp_path)
    write_recording(load(folder), path)
    text = path.read_text()
    assert INTEGRITY_KEY not in text
    assert INTEGRITY_KEY in str(load(folder))  # the control: it was there to be left out
    assert json.loads(text.splitlines()[0]) == {
        "darwin_recording": 1,
        "run_id": "250101-0000-abcd",
        "environment_id": "e1",
        "base_genome_id": GENOME.id,
    }
    assert [json.loads(line)["key"] for line in text.splitlines()[1:]] == [KEY, "g01-i02/0/0"]


def test_the_same_run_is_recorded_in_the_same_bytes(
    tmp_path: Path, recorded: tuple[Path, str]
) -> None:
    events = load(recorded[0])
    write_recording(events, named(tmp_path, "a.jsonl.gz"))
    write_recording(events, named(tmp_path, "b.jsonl.gz"))
    write_recording(events, named(tmp_path, "b.jsonl.gz"))
    first, second = (named(tmp_path, name).read_bytes() for name in ("a.jsonl.gz", "b.jsonl.gz"))
    assert first == second
    assert len(list((tmp_path / "kept").iterdir())) == 2  # and nothing half-written beside them


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}\n",
        b"[]\n",
        b"not JSON\n",
        b"\xff\xfe",
        gzip.compress(b'{"darwin_recording": 1}\n' * 50, mtime=0)[:-12],
        b'{"darwin_recording": 2}\n',
        b'{"darwin_recording": 1}\n{"kind": "job"}\n',
        b'{"darwin_recording": 1}\n{"kind": "jo',
    ],
)
def test_what_is_no_recording_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recording.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"recording\.jsonl"):
        Recording.read(path)


# --- trainings ----------------------------------------------------------------------------------


class Played:
    """An executor that gives one outcome after another."""

    n_slots = 1

    def __init__(self, outcomes: Sequence[JobResult | Exception]) -> None:
        self.outcomes = list(outcomes)

    def submit(self, job: Job) -> Future[JobResult]:
        future: Future[JobResult] = Future()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(replace(outcome, job_id=job.job_id))
        return future

    def close(self, cancel: bool = False) -> None:
        """Do nothing."""


SCORED = Evaluation(
    Status.OK,
    metrics={"val_perplexity": 9.5},
    rates={"mfu": 0.2},
    details={"windows": 3},
    startup_seconds=0.5,
    scoring_seconds=2.0,
)
TRAINED = TrainingRun(Status.OK, training_seconds=5.0, steps_claimed=100, log_tail="step 100")
GOOD = JobResult("", TRAINED, SCORED, total_seconds=8.0)
CROWDED = replace(GOOD, contended=True)
CRASHED = JobResult(
    "", TrainingRun(Status.CRASHED, Reason.EXCEPTION, "ValueError", exit_code=1, log_tail="...")
)
REJECTED = replace(GOOD, evaluation=Evaluation(Status.REJECTED, Reason.CAUSALITY, "looks ahead"))
LATE = JobResult("", TrainingRun(Status.INFRA_LOST, Reason.START_UP, "no ready signal"))
BROKEN = InfrastructureFailure("the engine is gone")

LIVES: list[tuple[Purpose, list[JobResult | Exception]]] = [
    (Purpose.SEARCH, [GOOD]),
    (Purpose.SEARCH, [CRASHED]),
    (Purpose.SEARCH, [REJECTED]),
    (Purpose.SEARCH, [CROWDED, GOOD]),
    (Purpose.SEARCH, [CROWDED, CROWDED, CROWDED]),
    (Purpose.SEARCH, [BROKEN, GOOD]),
    (Purpose.SEARCH, [BROKEN, BROKEN, BROKEN]),
    (Purpose.SEARCH, [LATE, CROWDED, CRASHED]),
    (Purpose.RETIME, [GOOD]),
    (Purpose.SMOKE, [CRASHED]),
]


def trials(executor: Executor, journal: Journal, seed: int = 0) -> Trials:
    folder = journal.path.parent
    training = TrainingSpec(budget_seconds=5.0, max_steps=100, seed=0, context_length=8)
    data = DataSpec(folder, "hash", 10)
    bench = Bench(
        seed,
        b"key",
        data,
        training,
        EvaluationSpec("val"),
        SandboxSpec("process"),
        run_folder=folder,
    )
    return Trials(bench, executor, journal)


def trial(n: int, purpose: Purpose, genome: Genome = GENOME) -> Trial:
    name = f"g01-i{n:02d}"
    split = None if purpose is Purpose.SMOKE else "val"
    return Trial(f"{name}/0", name, purpose, genome, split, f"individuals/{name}")


def carried_out(executor: Executor, folder: Path) -> list[tuple[str, Any]]:
    """Run every trial, and return what was written down, losses and times included."""
    journal = Journal(folder)
    for n, (purpose, _) in enumerate(LIVES):
        trials(executor, journal).run(trial(n, purpose))
    journal.close()
    return [(f"{event.kind} {event.key}", event.payload) for event in load(folder)]


def test_replayed_trainings_come_to_the_same_journal(tmp_path: Path) -> None:
    outcomes = [outcome for _, life in LIVES for outcome in life]
    live = carried_out(Played(outcomes), fresh(tmp_path / "live"))
    assert len(live) == len(outcomes)
    assert {payload["reason"] for _, payload in live} >= {"contention", "infrastructure"}
    write_recording(load(tmp_path / "live"), named(tmp_path))
    player = ReplayExecutor(Recording.read(named(tmp_path)))
    assert carried_out(player, fresh(tmp_path / "replay")) == live
    assert comparable(load(tmp_path / "replay")) == comparable(load(tmp_path / "live"))


@pytest.fixture
def player(tmp_path: Path) -> ReplayExecutor:
    journal = Journal(fresh(tmp_path / "live"))
    trials(Played([GOOD]), journal).run(trial(1, Purpose.SEARCH))
    journal.close()
    return ReplayExecutor(Recording.read(tmp_path / "live"), 2)


def test_a_training_of_other_code_or_under_another_seed_is_a_divergence(
    tmp_path: Path, player: ReplayExecutor
) -> None:
    journal = Journal(fresh(tmp_path / "replay"))
    with pytest.raises(Divergence, match=r"training g01-i01/0 was recorded with genome_id="):
        trials(player, journal).run(trial(1, Purpose.SEARCH, OTHER))
    with pytest.raises(Divergence, match="with seed="):
        trials(player, journal, seed=1).run(trial(1, Purpose.SEARCH))
    with pytest.raises(Divergence, match=r"no training g01-i02/0 is recorded"):
        trials(player, journal).run(trial(2, Purpose.SEARCH))
    assert journal.events() == []
    journal.close()


def test_a_player_has_slots_and_nothing_to_close(player: ReplayExecutor) -> None:
    assert player.n_slots == 2
    player.close(cancel=True)
    player.close()
