"""Controls: with a defence switched off the attack succeeds, so that its test can see something."""

from __future__ import annotations

import json
import math
import os
import pickle
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darwin_exp.evaluation import exchange, job, scorer
from darwin_exp.evaluation.exchange import ModelServer
from darwin_exp.evaluation.integrity import Agreement
from darwin_exp.gates import objection
from darwin_exp.individual import (
    DataSpec,
    Evaluation,
    Genome,
    Job,
    Reason,
    Status,
    TrainingRun,
)
from darwin_exp.protocols import Exit, Launch, Sandbox
from darwin_exp.sandbox.workfolder import WorkFolder
from tests.attacks import models
from tests.attacks.boxes import (
    CANARY,
    GREEDY,
    LOTTERY,
    REWRITES,
    Box,
    Found,
    Oversight,
    T,
    V,
    looks_for_held_out_text,
    opened,
    versions,
    write_data,
    write_shifted_data,
)


def assert_it_pays(found: Found, box: Box) -> None:
    """Make sure that an attack was taken for a good model, and for a better one than the honest."""
    assert (found.scored.status, found.scored.message) == (Status.OK, "")
    assert found.metrics["val_nats"] < box.honest["val_nats"] - 0.1


@pytest.fixture(scope="module")
def open_box(data: DataSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box that holds nothing hostile."""
    with opened(data, tmp_path_factory.mktemp("jobs-open")) as box:
        yield box


# --- A ------------------------------------------------------------------------------------------


def test_control_a1_with_nothing_in_between_the_machine_is_reached(open_box: Box) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        reach = f"import socket\nsocket.create_connection({address!r}, timeout=10).close()\n"
        assert open_box.run(reach).scored.status is Status.OK
        listener.settimeout(10)
        listener.accept()[0].close()


FORKS = """
n = 0
try:
    while n < 120:
        if os.fork() == 0:
            time.sleep(600)
        n += 1
except OSError:
    pass
print(n, flush=True)
"""


def test_control_a2_with_room_for_them_the_processes_come_to_be(process_box: Box) -> None:
    assert process_box.run(FORKS, training={"max_processes": 400}).printed == 120
    assert process_box.run(FORKS, training={"max_processes": 48}).printed < 60
    process_box.assert_nothing_is_left()


@pytest.mark.parametrize("kind", ["process", "docker"])
def test_control_a4_by_its_exit_status_alone_it_would_have_ended_well(box: Box) -> None:
    hoard = """
    if os.fork() == 0:
        hoard = []
        while True:
            hoard.append(bytearray(b"x") * 10_000_000)
            time.sleep(0.02)
    os.wait()
    """
    endings: list[Exit] = []

    def judge(ending: Exit) -> Exit:
        endings.append(ending)
        # A supervisor ends the whole group, so that no status of its own is left to be looked at.
        code = 0 if box.kind == "process" else ending.code
        return replace(ending, code=code, out_of_memory=False)

    found = box.run(hoard, training={"memory_mb": 128}, oversight=Oversight(judge=judge))
    (ending,) = set(endings)
    assert ending.out_of_memory
    assert ending.code == (None if box.kind == "process" else 0)
    assert found.scored.status is Status.OK
    assert found.metrics == box.honest


def test_control_a9_without_a_limit_the_file_fills_the_disk(process_box: Box) -> None:
    write = """
    with open("out/big", "wb", buffering=0) as file:
        for _ in range(200):
            file.write(b"x" * 1_000_000)
    """
    taken: list[int] = []
    process_box.run(
        write,
        training={"file_mb": 1024},
        look=lambda: taken.append(process_box.bytes_on_disk()),
    )
    assert taken[0] >= 200_000_000
    process_box.assert_nothing_is_left()


def test_control_a13_who_is_nobody_else_writes_where_the_harness_does(
    open_box: Box, tmp_path: Path
) -> None:
    open_box.run(f"Path({str(tmp_path / 'new')!r}).touch()\n")
    assert (tmp_path / "new").exists()


# --- B ------------------------------------------------------------------------------------------


class BelievesTheLog:
    """An evaluator as too many are: the last line that a training prints is its score."""

    def evaluate(self, job: Job, training: TrainingRun, sandbox: Sandbox) -> Evaluation:
        metrics = json.loads(training.log_tail.strip().splitlines()[-1])
        return Evaluation(Status.OK, metrics=metrics)


class BelievesTheModel:
    """An evaluator that has the loss worked out where the model's code runs."""

    def evaluate(self, job: Job, training: TrainingRun, sandbox: Sandbox) -> Evaluation:
        assert training.artefacts is not None
        tokens = np.arange(2 * T, dtype=np.int32).reshape(2, T) % V
        deadline = time.monotonic() + 60
        with ModelServer(job, training.artefacts, sandbox, "model", deadline) as server:
            _, losses = server.seconds_for(tokens, 1, bfloat16=False, compiled=False)
        return Evaluation(Status.OK, metrics={"val_nats": float(losses.mean())})


def test_control_b1_who_reads_the_log_is_told_what_it_likes(process_box: Box) -> None:
    boast = "print(json.dumps({'val_perplexity': 1.0, 'val_nats': 0.0}))\n"
    found = process_box.run(boast, evaluator=BelievesTheLog())
    assert_it_pays(found, process_box)


def test_control_b3_a_loss_from_where_the_model_runs_is_what_it_likes(process_box: Box) -> None:
    patch = """
import sys
sys.modules["logits_server"].Table.loss = staticmethod(lambda *_: 0.0)
"""
    honest = process_box.run(evaluator=BelievesTheModel())
    patched = process_box.run(model=models.HONEST + patch, evaluator=BelievesTheModel())
    assert honest.metrics["val_nats"] > 0.1
    assert patched.metrics["val_nats"] == 0.0


def test_control_b5_an_unverified_claim_is_taken_at_its_word(process_box: Box) -> None:
    found = process_box.run("claim(10**12)\n", evaluation={"peak_flops": 1e30})
    assert found.scored.status is Status.OK
    assert found.scored.rates["tokens_per_second"] > 1e9
    assert found.scored.rates["mfu"] == found.scored.rates["mfu_claimed"]


def test_control_b6_without_a_floor_perfection_is_taken_for_good(
    process_box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "PLAUSIBLE_BPB", 0.0)
    data = write_data(tmp_path / "monotone", shares=(1.0, 0.0, 0.0))
    assert_it_pays(process_box.run(data=data), process_box)


def test_control_b7_without_prefixes_reading_ahead_pays(process_box: Box) -> None:
    assert_it_pays(process_box.run(model=models.UNMASKED), process_box)


def test_control_b8_without_prefixes_a_block_mean_pays(process_box: Box) -> None:
    assert_it_pays(process_box.run(model=models.BLOCK_MEAN), process_box)


def test_control_b9_without_prefixes_a_convolution_that_wraps_around_pays(
    process_box: Box,
) -> None:
    assert_it_pays(process_box.run(model=models.CIRCULAR), process_box)


def test_control_b10_without_prefixes_an_outgrown_mask_pays(process_box: Box) -> None:
    sharp = "save([*table, [1e6] + [0.0] * (V - 1)])\n"
    assert_it_pays(process_box.run(sharp, model=models.FINITE_MASK), process_box)


def test_control_b11_unless_cut_or_asked_in_other_company_statistics_pass(
    process_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    over_time = process_box.run(model=models.NORM_OVER_TIME)
    for check in ("check_repeats", "check_alone"):
        monkeypatch.setattr(scorer, check, lambda *_: Agreement(n_positions=1))
    over_batch = process_box.run(model=models.BATCH_MEAN)
    for found in (over_time, over_batch):
        assert found.scored.status is Status.OK
        assert found.metrics != process_box.honest


def test_control_b12_with_nothing_in_between_held_out_text_is_seen(open_box: Box) -> None:
    look = looks_for_held_out_text(open_box.data)
    found = open_box.run(look + "\nprint(json.dumps(seen()))\n")
    assert "val.bin" in found.printed


def test_control_b14_asked_in_one_order_alone_who_repeats_itself_gains(process_box: Box) -> None:
    found = process_box.run("save([[0.0] * V] * V)\n", model=models.LEARNS_AND_REPEATS_ITSELF)
    assert found.scored.status is Status.OK
    assert found.metrics["val_perplexity"] < V / 2  # though all that was trained is a constant


def test_control_b14_unless_it_is_noticed_time_is_to_be_had_while_it_is_scored(
    process_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "FIRST_FACTOR", math.inf)
    found = process_box.run(model=models.WORKS_ON)
    assert found.metrics == process_box.honest
    assert found.scored.scoring_seconds > 3.0


def test_control_b14_in_a_shared_folder_word_is_left_and_found(
    open_box: Box, tmp_path: Path
) -> None:
    found = open_box.run(model=models.leaves_word([str(tmp_path)]), prefixes=48)
    assert (tmp_path / "note-of-a-candidate").exists()
    # It was the second server that found it: the first was the one to leave it.
    assert found.scored.reason is Reason.MODEL_CODE
    assert "AssertionError" in found.scored.message


def test_control_b14_unless_compared_with_the_rest_knowing_where_it_was_probed_pays(
    open_box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "check_unprobed", lambda *_: Agreement(n_positions=1))
    model = models.tells_where_it_was_asked(tmp_path / "notes")
    found = open_box.run(model=model, prefixes=48, evaluation={"second_pass": 0.0})
    assert_it_pays(found, open_box)


def test_control_b14_unless_asked_twice_who_learns_while_it_is_scored_gains(
    process_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    for check in ("check_repeats", "check_alone"):
        monkeypatch.setattr(scorer, check, lambda *_: Agreement(n_positions=1))
    found = process_box.run("save([[0.0] * V] * V)\n", model=models.LEARNS_FROM_QUESTIONS)
    assert found.scored.status is Status.OK
    assert found.metrics["val_perplexity"] < V / 2  # though all that was trained is a constant


def test_control_b16_scores_taken_for_probabilities_can_be_raised_at_will(
    process_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trusting(logits: Any, targets: Any) -> Any:
        return -np.take_along_axis(logits, targets[..., None], axis=2)[..., 0].astype(np.float64)

    assert process_box.honest  # as long as nothing is switched off
    monkeypatch.setattr(scorer, "negative_log_likelihood", trusting)
    higher = models.reshaped("[[[x + 0.3 for x in row] for row in rows] for rows in rows]")
    assert_it_pays(process_box.run(model=higher), process_box)


def test_control_b18_with_what_is_not_answered_left_out_silence_pays(
    process_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgiving(logits: Any, targets: Any) -> Any:
        known = np.nan_to_num(logits).astype(np.float64)
        at_target = np.take_along_axis(known, targets[..., None], axis=2)[..., 0]
        nats = np.log(np.exp(known).sum(axis=2)) - at_target
        return np.where(np.isfinite(logits).all(axis=2), nats, 0.0)

    assert process_box.honest  # as long as nothing is switched off
    monkeypatch.setattr(scorer, "negative_log_likelihood", forgiving)
    assert_it_pays(process_box.run(model=models.LEAVES_OUT), process_box)


def test_control_b20_without_prefixes_there_is_no_test_to_behave_in(process_box: Box) -> None:
    found = process_box.run(model=models.LEAKS_WHERE_IT_LOOKS_LIKE_TEXT)
    assert_it_pays(found, process_box)


def test_control_b21_a_pickle_that_is_loaded_does_as_it_likes(
    process_box: Box, tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    bomb = f"""
import pickle

class Bomb:
    def __reduce__(self):
        return (open, ({str(mark)!r}, "w"))

(out / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
"""
    found = process_box.run(bomb)
    assert not mark.exists()
    pickle.loads(found.artefacts["model.safetensors"].read_bytes()).close()
    assert mark.exists()


def test_control_b23_with_held_out_text_at_hand_a_lottery_is_drawn_on_it(
    process_box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted = write_shifted_data(tmp_path / "shifted")
    on_train = process_box.run(LOTTERY, data=shifted)
    launch = job._launch

    def with_held_out_text(one: Job) -> Launch:
        val = one.data.folder / "held_out" / "val.bin"
        made = launch(one)
        return replace(made, inputs={**made.inputs, "val.bin": val})

    monkeypatch.setattr(job, "_launch", with_held_out_text)
    on_val = process_box.run(LOTTERY, data=shifted)
    assert (on_train.printed[-1], on_val.printed[-1]) == (1, 2)
    assert on_val.metrics["val_nats"] < on_train.metrics["val_nats"] - 0.5


def test_control_b26_past_the_gate_a_table_in_the_code_is_worth_a_training(
    process_box: Box,
) -> None:
    raw = process_box.run().artefacts["model.safetensors"].read_bytes()
    table = np.frombuffer(raw[8 + int.from_bytes(raw[:8], "little") :], "<f4").reshape(V, V)
    hidden = models.HONEST.replace("table[tokens[t]]", "TABLE[tokens[t]]")
    hidden += f"\nTABLE = {table.tolist()}\n"
    parent = Genome.of({"train.py": "", "model.py": models.HONEST})
    found = objection(parent.with_files({"model.py": hidden}), parent)
    assert found is not None
    assert found[0] is Reason.HIDDEN_DATA
    untrained = process_box.run("save([[0.0] * V] * V)\n", model=hidden)
    assert untrained.metrics["val_nats"] == process_box.honest["val_nats"]


def test_control_b27_a_check_that_compared_nothing_would_be_a_pass(
    process_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "check_causality", lambda *_: Agreement())
    monkeypatch.setattr(scorer, "require_evidence", lambda *_: None)
    assert_it_pays(process_box.run(model=models.UNMASKED, prefixes=48), process_box)


def test_control_b28_unless_it_is_added_up_all_of_the_machine_is_to_be_had(
    process_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "CPU_SHARE", math.inf)
    found = process_box.run(GREEDY)
    assert found.scored.status is Status.OK
    assert found.printed == os.cpu_count()
    assert found.training.cpu_seconds > 0.5 * found.training.training_seconds + 0.2


# --- C ------------------------------------------------------------------------------------------


def test_control_c1_who_follows_a_link_hands_over_what_lies_behind_it(
    process_box: Box, secret_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(self: WorkFolder, name: str, target: Path, *_bounds: Any) -> int:
        content = (self.path / "out" / name).read_bytes()
        target.write_bytes(content)
        return len(content)

    monkeypatch.setattr(WorkFolder, "_copy", copy)
    link = f"(out / 'model.json').unlink()\n(out / 'model.json').symlink_to({str(secret_file)!r})\n"
    # What was fetched is given to the model, as its own arguments.
    model = models.HONEST + f"\nassert {CANARY!r} in open('in/model.json').read()\n"
    found = process_box.run(link, model=model)
    assert found.scored.status is Status.OK
    assert CANARY in found.artefacts["model.json"].read_text()


def test_control_c3_unless_holes_are_counted_they_are_paid_for(
    process_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = WorkFolder._copy

    def copy(self: WorkFolder, name: str, target: Path, _max_bytes: int, *others: Any) -> int:
        return bounded(self, name, target, 1 << 62, *others)

    monkeypatch.setattr(WorkFolder, "_copy", copy)
    holes = """
    for name in ("model.safetensors", "model.json"):
        os.truncate(out / name, 3 << 20)
    """
    found = process_box.run(holes, training={"file_mb": 4})
    sizes = [path.stat().st_blocks * 512 for path in found.artefacts.values()]
    assert sum(sizes) > 4 << 20


def test_control_c7_unless_it_is_frozen_what_is_taken_was_never_there_together(
    process_box: Box,
) -> None:
    moving = Oversight(pause_seconds=0.05, freezes=False)
    tokens, _, number = versions(process_box.run(REWRITES, oversight=moving))
    assert tokens > number + 1
