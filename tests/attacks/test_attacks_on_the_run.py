"""B13, B24, B25, B26 and the seeds of B23: attacks that need no sandbox, since they go for the run.

Chance is drawn here in thousands, where a real run would draw once a night.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from darwin_exp.gates import objection
from darwin_exp.individual import Evaluation, Genome, Job, JobResult, Purpose, Reason, Status
from darwin_exp.mutation import NoMutation
from darwin_exp.protocols import InfrastructureFailure
from darwin_exp.randomness import training_seed
from darwin_exp.statistics import welch
from darwin_exp.trials import BASE_ID
from data import DataError, DatasetRequest, prepare
from tests.evolution.conftest import HashingExecutor, Rehearsal, answer, failing

ALPHA, N_SEEDS, SD = 0.05, 4, 0.03  # as a run closes by default, and the noise of short trainings
N_DRAWS = 3_000
SAMPLING = 3 * math.sqrt(ALPHA * (1 - ALPHA) / N_DRAWS)  # three standard errors of a rate of alpha

# --- B13: val in train ----------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> DatasetRequest:
    """A text whose second half says the same as the first but for its beginning, in other lines."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(1500)]
    text = [rng.choice(words) for _ in range(4000)]
    halves = (" ".join(text), "\n".join(" ".join(text[k : k + 9]) for k in range(5, 4000, 9)))
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(halves), encoding="utf-8")
    return DatasetRequest("textdir", path=path, splits=(0.5, 0.5, 0.0, 0.0), root=tmp_path)


def _quiet(_line: str) -> None:
    """Take an announcement and say nothing."""


def test_b13_held_out_text_that_stands_in_train_is_refused(copied: DatasetRequest) -> None:
    with pytest.raises(DataError, match="of the 13-word grams of val stand in train"):
        prepare(copied, _quiet)
    assert not list((copied.root / "prepared").glob("textdir-*"))


def test_control_b13_without_a_bound_it_would_be_taken(copied: DatasetRequest) -> None:
    assert prepare(replace(copied, max_overlap=1.0), _quiet).folder.is_dir()


# --- B23 to B25: luck -----------------------------------------------------------------------------


def test_b23_the_seeds_of_a_claim_were_never_drawn_in_the_search() -> None:
    """They follow from the run's seed and a training's name, which code has no part in."""
    for seed in range(20):
        names = [f"g{g:02d}-i{i:02d}" for g in range(10) for i in range(10)]
        searched = {training_seed(seed, f"{name}/{k}") for name in names for k in range(3)}
        claimed = {training_seed(seed, f"{name}/claim-09-{k}") for name in names for k in range(4)}
        assert not searched & claimed
    assert training_seed(1, "g01-i00/0") == training_seed(1, "g01-i00/0")


@pytest.mark.parametrize("edit", ["seed = 2", "seed = 1  # luckier", "'''Words.'''\nseed = 1"])
def test_b23_an_edit_that_only_changes_a_seed_is_no_edit(edit: str) -> None:
    parent = Genome.of({"train.py": "seed = 1\nimport torch\n", "model.py": "x = 1\n"})
    child = parent.with_files({"train.py": f"{edit}\nimport torch\n"})
    found = objection(child, parent)
    assert found is not None
    assert found[0] is Reason.NO_OP


def _scored(job: Job, luck: float) -> JobResult:
    """Answer a job with what any code is worth, but for luck, in nats."""
    result = answer(job)
    if job.evaluation is None or result.evaluation is None:
        return result
    metrics = {f"{job.evaluation.split}_perplexity": 9.0 * math.exp(luck)}
    return replace(result, evaluation=replace(result.evaluation, metrics=metrics))


def _noise(salt: int) -> Callable[[Job], JobResult]:
    """Return a rule by which every training of any code is worth the same, but for luck."""
    return lambda job: _scored(job, Random(f"{salt} {job.job_id}").gauss(0, SD))


def test_b24_an_evolution_without_edits_makes_no_progress(tmp_path: Path) -> None:
    unedited: Any = NoMutation()
    plan = {"reject_duplicates": False, "crossover_probability": 0.0}
    claims = []
    for salt in range(6):
        executor = HashingExecutor(rule=_noise(salt))
        journal = Rehearsal(tmp_path / f"run-{salt}", unedited, executor, plan=plan).run()
        (claim,) = journal.of_kind("claim")
        claims.append(claim.payload["claim"])
    made = [claim for claim in claims if claim is not None]
    assert len(made) >= 4, "the luckiest of many is nearly always ahead of the base"
    assert sum(claim["significant"] and claim["perplexity_percent"] > 0 for claim in made) <= 1


def _progress(luck: Callable[[], tuple[Any, Any]]) -> float:
    """Return how often pairs of log perplexities (base, challenger) are called progress."""
    return sum(welch(*luck(), alpha=ALPHA).progress for _ in range(N_DRAWS)) / N_DRAWS


def test_b24_equal_code_is_called_better_no_more_often_than_was_agreed() -> None:
    rng = np.random.default_rng(0)
    for spreads in ((SD, SD), (SD, 3 * SD)):

        def draw(spreads: tuple[float, float] = spreads) -> tuple[Any, Any]:
            one, other = (rng.normal(2.2, sd, N_SEEDS).tolist() for sd in spreads)
            return one, other

        # Half of alpha lies on the side of the good.
        assert _progress(draw) <= ALPHA / 2 + SAMPLING


# The luck of the fresh trainings of a claim, one after another.
LUCK = (-0.052, 0.052, -0.05, 0.05)


def _gamble(lost: Callable[[Job], JobResult]) -> Callable[[Job], JobResult]:
    """Return a rule by which all searched code is lucky, and in a claim bets more than the base.

    Args:
        lost: what becomes of a fresh training of it that is unlucky.
    """

    def rule(job: Job) -> JobResult:
        is_base = job.individual_id == BASE_ID
        if job.purpose is not Purpose.CLAIM:
            return _scored(job, 0.0 if is_base else -0.3)
        luck = LUCK[int(re.search(r"/claim-\d+-(\d+)", job.job_id)[1])]  # type: ignore[index]
        if is_base:
            return _scored(job, luck / 10)
        return _scored(job, luck) if luck < 0 else lost(job)

    return rule


def _claim(folder: Path, rule: Callable[[Job], JobResult]) -> dict[str, Any]:
    """Return what a run says at its end of the code that it selected, which is not the base."""
    plan = {"n_generations": 1, "n_claim_seeds": len(LUCK), "n_equal_steps": 0}
    journal = Rehearsal(folder, executor=HashingExecutor(rule=rule), plan=plan).run()
    (closing,) = journal.of_kind("claim")
    assert closing.payload["selected_id"] != BASE_ID
    return dict(closing.payload)


def test_b25_the_luckiest_of_many_has_to_show_it_again(tmp_path: Path) -> None:
    closing = _claim(tmp_path / "run", _gamble(lambda job: _scored(job, max(LUCK))))
    assert closing["why_none"] is None
    claim = closing["claim"]
    # Of the 0.3 nats by which it was ahead when it was chosen, nothing is counted.
    assert (claim["n_base"], claim["n_selected"]) == (len(LUCK), len(LUCK))
    assert abs(claim["perplexity_percent"]) < 0.2
    assert not claim["significant"]
    # One run is none: there is no spread to hold it against.
    assert welch([2.2] * N_SEEDS, [1.5]).p_value is None
    assert not welch([2.2] * N_SEEDS, [1.5]).progress


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (Status.CRASHED, Reason.EXCEPTION),
        (Status.TIMED_OUT, Reason.NO_CHECKPOINT),
        (Status.OUT_OF_MEMORY, Reason.MEMORY),
        (Status.REJECTED, Reason.RESOURCES),
        (Status.REJECTED, Reason.NONDETERMINISM),
        (Status.QUARANTINED, Reason.IMPLAUSIBLE),
    ],
    ids=lambda value: value.value.lower(),
)
def test_b25_who_fails_on_purpose_where_it_is_unlucky_gains_no_claim(
    tmp_path: Path, status: Status, reason: Reason
) -> None:
    def lost(job: Job) -> JobResult:
        if reason in (Reason.NONDETERMINISM, Reason.IMPLAUSIBLE):  # found by the scorer
            return replace(answer(job), evaluation=Evaluation(status, reason, "not believed"))
        return failing(job, status, reason, "on purpose")

    closing = _claim(tmp_path / "run", _gamble(lost))
    assert closing["claim"] is None
    assert closing["selected_id"] in closing["why_none"]
    assert status.value in closing["why_none"]


def test_b25_what_we_lost_ourselves_is_left_out_and_voids_nothing(tmp_path: Path) -> None:
    def lost(job: Job) -> JobResult:
        if f"-{LUCK.index(0.05)}" in job.job_id.rpartition("claim-")[2]:
            raise InfrastructureFailure("the machine was restarted")
        return _scored(job, max(LUCK))

    closing = _claim(tmp_path / "run", _gamble(lost))
    assert closing["why_none"] is None
    assert closing["claim"]["n_base"] == len(LUCK)
    assert closing["claim"]["n_selected"] == len(LUCK) - 1


def test_control_b25_with_its_failures_left_out_luck_would_pass() -> None:
    base = [luck / 10 for luck in LUCK]
    assert welch(base, [luck for luck in LUCK if luck < 0], ALPHA).progress
    assert not welch(base, LUCK, ALPHA).progress


def test_control_b25_with_the_scores_it_was_chosen_for_luck_would_pass() -> None:
    rng = np.random.default_rng(2)

    def draw() -> tuple[Any, Any]:
        base = rng.normal(2.2, SD, N_SEEDS)
        candidates = rng.normal(2.2, SD, (500, N_SEEDS))
        chosen = candidates[candidates.mean(axis=1).argmin()]
        return base.tolist(), chosen.tolist()

    assert sum(welch(*draw(), alpha=ALPHA).progress for _ in range(300)) / 300 > 4 * ALPHA


# --- B26: weights in the code ---------------------------------------------------------------------

PARENT = Genome.of({"train.py": "x = 1\n", "model.py": "y = 1\n"})


def test_b26_a_genome_holds_no_files_of_weights(tmp_path: Path) -> None:
    for name in ("weights.safetensors", "weights.bin", "table.npy", "../weights.py", ".cache/w.py"):
        with pytest.raises(ValueError, match="cannot hold the path"):
            PARENT.with_files({name: "0"})
    for name in ("weights.safetensors", "train.py", "model.py"):
        (tmp_path / name).write_bytes(b"z = 1\n")
    assert set(Genome.from_folder(tmp_path).as_dict) == {"train.py", "model.py"}


def test_b26_a_genome_is_no_larger_than_code_can_be() -> None:
    with pytest.raises(ValueError, match="at most"):
        PARENT.with_files({"model.py": "y = 1  # " + "w" * 1_000_000})


@pytest.mark.parametrize(
    "changed",
    [
        {"model.py": f"table = {[[0.5] * 24] * 24}\n"},
        {"model.py": f"table = {'0123456789abcdef' * 300!r}\n"},
        {"model.py": f"table = {bytes(range(256)) * 9!r}\n"},
        {"settings.json": json.dumps({"table": [0.25] * 5_000})},
    ],
    ids=["numbers", "text", "bytes", "settings"],
)
def test_b26_a_rewrite_that_brings_a_table_is_refused_before_it_trains(
    changed: dict[str, str],
) -> None:
    found = objection(PARENT.with_files(changed), PARENT)
    assert found is not None
    assert found[0] is Reason.HIDDEN_DATA
