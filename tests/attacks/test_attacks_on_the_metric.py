"""B1 to B29: ways to a better number that are not better training."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from darwin_exp.evaluation import exchange, job, logits_server, rate, scorer
from darwin_exp.evaluation.exchange import ModelServer
from darwin_exp.evaluation.integrity import Agreement
from darwin_exp.individual import DataSpec, Reason, Status
from darwin_exp.protocols import InfrastructureFailure
from tests.attacks import models, table_server
from tests.attacks.boxes import (
    CLEAN_UP_SECONDS,
    GREEDY,
    LOTTERY,
    OK,
    STEPS,
    ZOO,
    Box,
    T,
    V,
    costs,
    favour,
    looks_for_held_out_text,
    opened,
    torch_train,
    write_data,
    write_shifted_data,
)

CAUSALITY = (Status.REJECTED, Reason.CAUSALITY)
NONDETERMINISM = (Status.REJECTED, Reason.NONDETERMINISM)
SHAPE = (Status.REJECTED, Reason.SHAPE)
NONFINITE = (Status.REJECTED, Reason.NONFINITE)
MODEL_CODE = (Status.REJECTED, Reason.MODEL_CODE)
ARTEFACT = (Status.REJECTED, Reason.ARTEFACT)
IMPLAUSIBLE = (Status.QUARANTINED, Reason.IMPLAUSIBLE)

VERIFIED: dict[str, Any] = {"verify_rate": True, "peak_flops": 1e15}


@pytest.fixture
def quick_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the harness time a model for moments: the fake is equally fast at every size."""
    monkeypatch.setattr(rate, "TOKENS_PER_BATCH", {"cpu": (512,)})
    monkeypatch.setattr(rate, "TIMED_SECONDS", 0.05)


@pytest.fixture(scope="module")
def open_box(data: DataSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box that holds nothing hostile, for attacks by whoever has found a way out."""
    with opened(data, tmp_path_factory.mktemp("jobs-open")) as box:
        yield box


def test_the_fake_server_speaks_the_language_of_the_real_one() -> None:
    for name in ("LOGITS", "USES", "RATE", "LOAD", "FORWARD", "DONE", "FAILED"):
        assert getattr(table_server, name) == getattr(logits_server, name)
    assert table_server.MAX_ERROR_CHARACTERS == logits_server.MAX_ERROR_CHARACTERS
    assert table_server.REQUEST.format == logits_server.REQUEST.format
    assert table_server.ANSWER.format == logits_server.ANSWER.format


# --- numbers that the candidate tells -------------------------------------------------------------


def test_b1_what_is_printed_is_no_metric(box: Box) -> None:
    boast = """
    print("step 3: val_perplexity 1.0, val_bpb 0.31, mfu 99%")
    print(json.dumps({"status": "OK", "metrics": {"val_perplexity": 1.0, "val_bpb": 0.31}}))
    """
    assert box.attack(OK, boast).metrics == box.honest


def test_b2_what_is_written_is_no_metric(box: Box) -> None:
    write = """
import os
from pathlib import Path
for name in ("metrics.json", "evaluation.json", "DONE", "val_perplexity"):
    for folder in ("out", "..", os.environ["TMPDIR"]):
        try:
            Path(folder, name).write_text('{"status": "OK", "val_perplexity": 1.0}')
        except OSError:
            pass
"""
    found = box.attack(OK, write, model=models.HONEST + write)
    assert found.metrics == box.honest
    told = json.loads((found.folder / "evaluation.json").read_text())
    assert told["evaluation"]["metrics"] == box.honest
    assert set(found.artefacts) == {"model.safetensors", "model.json", "progress.jsonl"}


def test_b3_a_patched_loss_changes_no_score(box: Box) -> None:
    patch = """
import json, sys
server = sys.modules["logits_server"]
server.Table.loss = staticmethod(lambda *_: 0.0)
json.dumps = lambda *_: '{"rows": {}, "activation_flops": 1e308}'
answer_honestly = answer

def answer(table, sequences, arguments):
    math.exp = math.log = lambda x: 0.0
    return answer_honestly(table, sequences, arguments)
"""
    found = box.attack(OK, model=models.HONEST + patch, prefixes=48)
    assert found.metrics == box.honest


def test_b3_patched_torch_changes_no_score(torch_box: Box) -> None:
    patch = """
if __name__ == "model":
    F.cross_entropy = lambda *_, **__: torch.zeros(())
    F.log_softmax = torch.log_softmax = lambda x, *_, **__: x * 0
    torch.Tensor.log_softmax = lambda x, *_, **__: x * 0
"""
    found = torch_box.attack(OK, model=ZOO.read_text(encoding="utf-8") + patch)
    assert found.metrics == torch_box.honest


STOPPED_CLOCK = """
import time
time.time = time.monotonic = time.perf_counter = time.process_time = lambda: 0.0
"""


@pytest.mark.usefixtures("quick_readings")
def test_b4_a_stopped_clock_makes_nobody_faster(box: Box) -> None:
    found = box.attack(
        OK,
        f"time.sleep(0.5)\n{STOPPED_CLOCK}\nclaim(10**9)\n",
        model=models.HONEST + STOPPED_CLOCK,
        evaluation=VERIFIED,
    )
    assert found.training.training_seconds > 0.45
    assert set(found.scored.rates) == {"mfu_claimed"}  # by the clock of the harness, a false count
    assert "count of tokens is not believed" in found.scored.details["speed"]["note"]
    assert found.metrics == box.honest


@pytest.mark.usefixtures("quick_readings")
def test_b5_a_claim_beyond_what_the_model_can_do_is_not_believed(box: Box) -> None:
    honest = box.run("claim(50)\n", evaluation=VERIFIED)
    assert honest.scored.rates["mfu"] == honest.scored.rates["mfu_claimed"]
    false = box.attack(OK, "claim(10**12)\n", goes_on=False, evaluation=VERIFIED)
    assert set(false.scored.rates) == {"mfu_claimed"}
    assert "count of tokens is not believed" in false.scored.details["speed"]["note"]
    # Nor is who does less work while it is timed than while it is scored.
    skip = """
import sys
sys.modules["logits_server"].Table.loss = staticmethod(lambda *_: 0.0)
"""
    skipping = box.attack(OK, "claim(10**12)\n", model=models.HONEST + skip, evaluation=VERIFIED)
    assert "tokens_per_second" not in skipping.scored.rates
    assert false.metrics == skipping.metrics == box.honest


@pytest.fixture(scope="module")
def monotone(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    """Text in which every token is followed by the next one, as anybody can predict."""
    return write_data(tmp_path_factory.mktemp("prepared") / "monotone", shares=(1.0, 0.0, 0.0))


def test_b6_what_is_too_good_to_be_true_is_put_aside(box: Box, monotone: DataSpec) -> None:
    fast = box.attack(IMPLAUSIBLE, evaluation={"peak_flops": 1.0}, goes_on=False)
    assert "above what the hardware can do" in fast.scored.message
    sure = box.attack(IMPLAUSIBLE, data=monotone)
    assert "bits per byte" in sure.scored.message


# --- models that read ahead -----------------------------------------------------------------------


def test_b7_attention_without_a_mask_is_rejected(box: Box) -> None:
    found = box.attack(CAUSALITY, model=models.UNMASKED, prefixes=48)
    assert "reads ahead" in found.scored.message


def test_b7_a_real_model_without_a_mask_is_rejected(torch_box: Box) -> None:
    torch_box.attack(CAUSALITY, train=torch_train("unmasked"), prefixes=48)


def test_b8_leaks_within_blocks_are_rejected(box: Box) -> None:
    for model in box.some(models.BLOCK_MEAN, models.ONE_IN_SIXTEEN):
        box.attack(CAUSALITY, model=model, prefixes=48, goes_on=False)
    box.assert_the_loop_goes_on()


def test_b8_a_real_block_mean_is_rejected(torch_box: Box) -> None:
    torch_box.attack(CAUSALITY, train=torch_train("block_mean"), prefixes=48)


def test_b9_a_convolution_that_wraps_around_is_rejected(box: Box) -> None:
    box.attack(CAUSALITY, model=models.CIRCULAR, prefixes=48)


@pytest.mark.parametrize("model", ["circular", "reversed_convolution"])
def test_b9_a_real_convolution_that_wraps_around_is_rejected(torch_box: Box, model: str) -> None:
    torch_box.attack(CAUSALITY, train=torch_train(model), prefixes=48)


def sharpness(value: float) -> str:
    """Return what saves a table whose model attends that sharply."""
    return f"save([*table, [{value}] + [0.0] * (V - 1)])\n"


def test_b10_a_mask_that_learned_weights_outgrow_is_rejected(box: Box) -> None:
    # The code is the same in both; only the trained weights tell.
    box.attack(OK, sharpness(1.0), model=models.FINITE_MASK, prefixes=48, goes_on=False)
    box.attack(CAUSALITY, sharpness(1e6), model=models.FINITE_MASK, prefixes=48)


def test_b10_a_real_mask_that_learned_weights_outgrow_is_rejected(torch_box: Box) -> None:
    sharpen = "model.mixer.sharpness.data.fill_(1e6)"
    torch_box.attack(CAUSALITY, train=torch_train("finite_mask", sharpen), prefixes=48)


def test_b11_statistics_over_time_or_batch_are_rejected(box: Box) -> None:
    box.attack(CAUSALITY, model=models.NORM_OVER_TIME, prefixes=48, goes_on=False)
    found = box.attack(NONDETERMINISM, model=models.BATCH_MEAN, prefixes=48)
    assert "mixes the sequences of a batch" in found.scored.message


@pytest.mark.parametrize(
    ("model", "verdict"), [("sequence_norm", CAUSALITY), ("batch_mean", NONDETERMINISM)]
)
def test_b11_real_statistics_are_rejected(
    torch_box: Box, model: str, verdict: tuple[Status, Reason]
) -> None:
    torch_box.attack(verdict, train=torch_train(model), prefixes=48)


# --- held-out text --------------------------------------------------------------------------------


def test_b12_held_out_text_is_in_nobodys_sight(box: Box) -> None:
    look = looks_for_held_out_text(box.data)
    told = """
print(json.dumps([seen(), sorted(os.listdir("in")), "held_out" in str(job), mounts("/job-")]))
"""
    check = "\nassert not seen()\nassert len(os.listdir('in')) == 2\n"
    found = box.attack(OK, look + told, model=models.HONEST + look + check)
    *nothing, own = found.printed
    assert nothing == [[], ["train.bin"], False]
    assert own, "who looks through the mounts would see none"
    assert found.metrics == box.honest


def test_b12_an_error_quotes_no_held_out_token(box: Box) -> None:
    for model in box.some(
        models.QUOTES_IN_ITS_ERROR,
        models.QUOTES_ON_ITS_LOG,
        models.QUOTES_IN_THE_HARNESS_S_PLACE,
    ):
        found = box.attack(MODEL_CODE, model=model, goes_on=False)
        assert "Told" not in found.scored.message
        assert "Told" not in (found.folder / "evaluation.json").read_text()
        # A line's number or a status may be told, and no more than one of them.
        assert len(re.findall(r"\d+", found.scored.message)) <= 1, found.scored.message
    box.assert_the_loop_goes_on()


def test_b14_who_learns_from_what_it_is_asked_is_rejected(box: Box) -> None:
    # Asked twice for the same, or asked in two orders: each is enough.
    for prefixes, told in box.some((0, "sent twice"), (48, "in another order")):
        found = box.attack(
            NONDETERMINISM, model=models.LEARNS_FROM_QUESTIONS, prefixes=prefixes, goes_on=False
        )
        assert told in found.scored.message
    found = box.attack(NONDETERMINISM, model=models.LEARNS_AND_REPEATS_ITSELF, prefixes=48)
    assert "in another order" in found.scored.message


def test_b14_who_goes_on_with_its_training_while_it_is_scored_is_rejected(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "FIRST_GRACE_SECONDS", {"cpu": 1.0})
    found = box.attack(MODEL_CODE, model=models.WORKS_ON, goes_on=False)
    assert "must neither train" in found.scored.message


def test_b14_no_model_server_leaves_word_for_the_next(box: Box) -> None:
    folders = (".", "in", "out", "code", "/", "/tmp", "/var/tmp", "/dev/shm", "/run", "/programs")
    more = """
import ctypes, socket, time

files, touch = word, leave_word
libc, address = ctypes.CDLL(None), chr(0) + "note-of-a-candidate"
started = []

def word():
    found = files()
    if libc.shmget(77077, 1, 0) != -1:
        found.append("shared memory")
    with socket.socket(socket.AF_UNIX) as end:
        if end.connect_ex(address) == 0:
            found.append("a daemon")
    return found

def leave_word():
    touch()
    libc.shmget(77077, 1, 0o1666)
    if not started and os.fork() == 0:
        try:
            os.setsid()
            end = socket.socket(socket.AF_UNIX)
            end.bind(address)
            end.listen()
            time.sleep(600)
        finally:
            os._exit(0)
    started.append(True)
"""
    model = models.leaves_word(folders) + more
    # A server's word is to be seen by itself, or the next one would see nothing in any case.
    check = """
assert not word(), word()
answer_first = answer

def answer(table, sequences, arguments):
    answers = answer_first(table, sequences, arguments)
    deadline = time.monotonic() + 10
    while not {"shared memory", "a daemon"} <= set(word()):
        assert time.monotonic() < deadline, word()
        time.sleep(0.01)
    return answers
"""
    left = box.attack(
        OK, models.leaves_word(folders) + more + "leave_word()\ntime.sleep(0.1)\n", goes_on=False
    )
    found = box.attack(OK, model=model + check, prefixes=48)
    assert left.metrics == found.metrics == box.honest


def test_b14_no_two_model_servers_share_a_file(box: Box) -> None:
    # What the kernel remembers of a file, such as which of its pages were read, it remembers by
    # the inode. Both are alive at once, so that one cannot have got the number of the other.
    artefacts = box.run().folder / "artefacts"
    asked, deadline = box.job(), time.monotonic() + 60
    with (
        ModelServer(asked, artefacts, box.sandbox, "model", deadline),
        ModelServer(asked, artefacts, box.sandbox, "model", deadline),
    ):
        inner: Any = box.sandbox
        folders = list(inner._root.path.glob("job-*"))
        assert len(folders) == 2
        for name in ("model.safetensors", "model.json"):
            files = [(folder / "in" / name).stat() for folder in folders]
            assert len({file.st_ino for file in files}) == 2, name
            assert {file.st_nlink for file in files} == {1}, name
    box.assert_nothing_is_left()


def test_b14_word_of_where_the_first_server_was_probed_gains_nothing(
    open_box: Box, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    found = open_box.attack(
        CAUSALITY,
        model=models.tells_where_it_was_asked(notes),
        prefixes=48,
        evaluation={"second_pass": 0.0},
    )
    assert "where it was not probed" in found.scored.message
    assert len(notes.read_text().splitlines()) >= 48


# --- what is counted, and how ---------------------------------------------------------------------


def test_b15_tokens_and_bytes_are_counted_by_the_harness(box: Box) -> None:
    tokens = np.fromfile(box.data.folder / "held_out" / "val.bin", dtype="<u2")[1:]
    n_bytes = int((2 - tokens % 2).sum())
    bits = box.honest["val_nats"] * len(tokens) / math.log(2)
    assert box.honest["val_bpb"] == pytest.approx(bits / n_bytes, rel=1e-12)
    own = """
    save(table, {"vocab_size": 1, "token_byte_lengths": [99] * V, "n_bytes": 10**9})
    (out / "token_byte_lengths.npy").write_bytes(b"")
    """
    assert box.attack(OK, own, goes_on=False).metrics == box.honest
    padded = "[[list(row) + [0.0] * 8 for row in sequence] for sequence in rows]"
    box.attack(SHAPE, model=models.reshaped(padded))


def test_b16_scores_that_are_no_probabilities_win_nothing(box: Box) -> None:
    higher = models.reshaped("[[[x + 300.0 for x in row] for row in rows] for rows in rows]")
    found = box.attack(OK, model=higher, goes_on=False)
    assert found.metrics["val_nats"] == pytest.approx(box.honest["val_nats"], abs=1e-3)
    for value in box.some("nan", "inf", "-inf"):
        one = f"[[[float({value!r}), *row[1:]] for row in rows] for rows in rows]"
        box.attack(NONFINITE, model=models.reshaped(one), goes_on=False)
    weights = box.attack(NONFINITE, "save([[float('nan')] * V] * V)\n")
    assert weights.result.evaluation is None


def test_b17_answers_of_another_shape_are_rejected(box: Box) -> None:
    for how in box.some(
        "[[list(row) + [9.0] for row in sequence] for sequence in rows]",  # more tokens
        "[[row[1:] for row in sequence] for sequence in rows]",  # fewer
        "[sequence[1:] for sequence in rows]",  # shorter
        "rows[1:]",
        "[[sequence[t] for sequence in rows] for t in range(len(rows[0]))]",  # axes swapped
    ):
        box.attack(SHAPE, model=models.reshaped(how), goes_on=False)
    # Another row's scores have the right shape, and change with the company.
    box.attack(NONDETERMINISM, model=models.reshaped("rows[::-1]"))


def test_b18_no_target_can_be_left_out(box: Box) -> None:
    found = box.run(prefixes=48)
    n_windows = (1921 - 1) // T
    assert found.scored.details["windows"] == n_windows
    assert found.scored.details["windows_available"] == n_windows
    # Claims to answer for all and goes away after the easy half.
    leave = """
import os, struct
answer_honestly = answer

def answer(table, sequences, arguments):
    n_rows, length, width = len(sequences), len(sequences[0]), len(table[0])
    os.write(5, struct.pack("<B3I", 0, n_rows, length, width) + bytes(2 * n_rows * length * width))
    os._exit(0)
"""
    found = box.attack(MODEL_CODE, model=models.HONEST + leave)
    assert "ended while it was scored" in found.scored.message


def test_b19_targets_that_a_genome_would_ignore_are_scored_like_any_other(box: Box) -> None:
    ignore = "save(table, {'ignore_index': 3, 'label_smoothing': 0.5, 'reduction': 'none'})\n"
    found = box.attack(OK, ignore)
    # The same sum by another hand, over all targets, from the weights that were left.
    raw = found.artefacts["model.safetensors"].read_bytes()
    table = np.frombuffer(raw[8 + int.from_bytes(raw[:8], "little") :], "<f4").reshape(V, V)
    expected = float(costs(table, box.data).mean())
    assert found.metrics["val_nats"] == pytest.approx(expected, rel=1e-10)
    assert found.metrics == box.honest


def test_b20_who_behaves_while_it_is_probed_is_rejected(box: Box) -> None:
    for model, verdict in box.some(
        (models.HONEST_AT_FIRST, NONDETERMINISM),
        (models.LEAKS_WHERE_IT_LOOKS_LIKE_TEXT, CAUSALITY),
    ):
        box.attack(verdict, model=model, prefixes=48, goes_on=False)
    if box.kind != "process":  # whose working folders have numbers
        box.attack(OK, model=models.TELLS_ITS_SURROUNDINGS, prefixes=48, goes_on=False)
    box.assert_the_loop_goes_on()


# --- checkpoints that are more than numbers -------------------------------------------------------


def test_b21_a_pickle_is_not_executed(box: Box, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    pickle = f"""
import pickle, zipfile

class Bomb:
    def __reduce__(self):
        return (open, ({str(mark)!r}, "w"))
"""
    plain = '\n(out / "model.safetensors").write_bytes(pickle.dumps(Bomb()))\n'
    zipped = """
with zipfile.ZipFile(out / "model.safetensors", "w") as archive:
    archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
"""
    for way in box.some(plain, zipped):
        found = box.attack(ARTEFACT, pickle + way, goes_on=False)
        assert found.result.evaluation is None
    assert not mark.exists()
    box.assert_the_loop_goes_on()


def test_b22_headers_that_lie_are_found_out_at_once(box: Box) -> None:
    exabyte = """
    (out / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    """
    elements = """
    entry = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}
    header = json.dumps({"table": entry}).encode()
    lie = struct.pack("<Q", len(header)) + header + bytes(4)
    (out / "model.safetensors").write_bytes(lie)
    """
    nested = """
    header = b"[" * 100_000
    (out / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    """
    packed = """
    import zipfile
    with zipfile.ZipFile(out / "model.safetensors", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("table", bytes(20_000_000))
    """
    for lie in box.some(exabyte, elements, nested, packed):
        found = box.attack(ARTEFACT, lie, goes_on=False)
        assert found.seconds < CLEAN_UP_SECONDS
    box.assert_the_loop_goes_on()


# --- luck, telemetry, limits and nothing at all ---------------------------------------------------


@pytest.fixture(scope="module")
def shifted(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    return write_shifted_data(tmp_path_factory.mktemp("prepared") / "shifted")


def test_b23_a_lottery_over_seeds_is_drawn_on_train_alone(box: Box, shifted: DataSpec) -> None:
    found = box.attack(OK, LOTTERY, data=shifted, training={"seed": 77})
    seed, drawn, chosen = found.printed
    assert seed == 77
    assert sorted(drawn) == list(STEPS)
    # What it chose is right for the training text, and wrong for the text that it is scored on.
    expected = {step: float(costs(favour(step), shifted).mean()) for step in STEPS}
    assert chosen == 1
    assert found.metrics["val_nats"] == pytest.approx(expected[1], rel=1e-6)
    assert min(expected.values()) < expected[1] - 0.5


def test_b27_what_was_not_measured_is_missing_and_who_refuses_a_probe_is_rejected(
    box: Box,
) -> None:
    silent = box.attack(OK, "(out / 'progress.jsonl').unlink()\n", prefixes=48, goes_on=False)
    assert silent.scored.rates == {}
    assert silent.training.tokens_claimed is None
    # The scorer's own record of what it checked stands beside every score.
    details = silent.scored.details
    for check in ("causality", "unprobed", "order", "repeats", "alone"):
        assert details[check]["n_positions"] >= 2 * T, check
    box.attack(MODEL_CODE, model=models.REFUSES_WHAT_LOOKS_LIKE_A_PROBE, prefixes=48)


def test_b27_a_check_that_compared_nothing_is_our_failure_and_no_pass(
    process_box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = ("check_causality", "check_unprobed", "check_order", "check_repeats", "check_alone")
    for check in checks:
        with monkeypatch.context() as patch:
            patch.setattr(scorer, check, lambda *_, **__: Agreement())
            with pytest.raises(InfrastructureFailure, match="compared nothing"):
                process_box.run(prefixes=48)
    process_box.assert_the_loop_goes_on()


def test_b28_limits_are_out_of_reach(box: Box) -> None:
    loosen = """
    import resource, signal
    for path in ("job.json", "/programs/launcher.py", sys.modules["__main__"].__file__):
        try:
            os.chmod(path, 0o777)
            open(path, "w").close()
            print("wrote", path)
        except OSError:
            pass
    raised = []
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):
        try:
            resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            raised.append(kind)
        except (ValueError, OSError):
            pass
    signal.alarm(0)
    job["budget_seconds"] = 600
    for name in ("model.json", "model.safetensors"):
        (out / name).unlink()
    print(json.dumps(raised), flush=True)
    while True:
        time.sleep(1)
    """
    found = box.attack(
        (Status.TIMED_OUT, Reason.NO_CHECKPOINT),
        loosen,
        training={"budget_seconds": 1.0, "max_steps": None},
    )
    assert found.log == "[]\n"
    assert found.seconds < 1.0 + CLEAN_UP_SECONDS + found.training.startup_seconds


def test_b28_who_takes_more_of_the_machine_than_its_slot_has_is_rejected(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine nobody gets two CPUs, so here a slot has half of one."""
    if box.kind == "docker":  # whose kernel gives it no other CPU
        found = box.attack(OK, GREEDY)
        assert found.printed == 1
        most = job.CPU_SHARE * found.training.training_seconds + job.CPU_GRACE_SECONDS
        assert found.training.cpu_seconds < most
        assert found.metrics == box.honest
        return
    with monkeypatch.context() as patched:
        patched.setattr(job, "CPU_SHARE", 0.5)
        patched.setattr(job, "CPU_GRACE_SECONDS", 0.2)
        found = box.attack((Status.REJECTED, Reason.RESOURCES), GREEDY, goes_on=False)
    assert found.printed == os.cpu_count()  # nothing but its conscience keeps it from the others
    assert found.result.evaluation is None
    assert "CPU time" in found.training.message
    box.assert_the_loop_goes_on()


def test_b29_nobody_scores_better_than_the_floor_by_doing_nothing(box: Box) -> None:
    box.attack((Status.CRASHED, Reason.NO_CHECKPOINT), train="", goes_on=False)
    tokens = np.fromfile(box.data.folder / "held_out" / "val.bin", dtype="<u2")[1:]
    floor = math.log2(V) * len(tokens) / int((2 - tokens % 2).sum())
    constant = box.attack(OK, "save([[0.0] * V] * V)\n", goes_on=False)
    assert constant.metrics["val_perplexity"] == pytest.approx(V, rel=1e-9)
    assert constant.metrics["val_bpb"] == pytest.approx(floor, rel=1e-9)
    drawn = """
    import random
    rng = random.Random(0)
    save([[rng.gauss(0, 1) for _ in range(V)] for _ in range(V)])
    """
    assert box.attack(OK, drawn).metrics["val_bpb"] > floor
