"""Whole jobs in the real sandbox: what a run leaves decides what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.evaluation.job import read_progress, run_job
from darwin_exp.evaluation.scorer import Scorer
from darwin_exp.individual import Evaluation, Job, JobResult, Reason, Status
from darwin_exp.protocols import Exit, InfrastructureFailure, Launch, Zone

MakeJob = Callable[..., Job]
Run = Callable[..., JobResult]

SAVE = """
import json, os, sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from model import build_model
job = json.loads(Path(sys.argv[1]).read_text())
out = Path(sys.argv[1]).parent / job["out"]
arguments = {"kind": "table", "vocab_size": job["vocab_size"]}
torch.manual_seed(job["seed"])
model = build_model(arguments)
(out / "model.json").write_text(json.dumps(arguments))
save_file(model.state_dict(), out / "model.safetensors")
progress = {"step": 3, "tokens": 1200, "loss": 3.5}
(out / "progress.jsonl").write_text(json.dumps(progress) + "\\n")
"""


@pytest.fixture
def run(make_job: MakeJob, sandbox: Any, zoo: str) -> Run:
    """Return a function that runs a job whose train.py saves a table, then does as it is told."""

    def go(then: str = "", train: str = SAVE, **changes: Any) -> JobResult:
        job = make_job(train + then, zoo, **changes)
        return run_job(job, sandbox, Scorer())

    return go


def test_a_job_trains_scores_and_accounts_for_its_time(run: Run, tmp_path: Path) -> None:
    found = run()
    training, scored = found.training, found.evaluation
    assert (training.status, training.message) == (Status.OK, "")
    assert scored is not None
    assert (scored.status, scored.message) == (Status.OK, "")
    assert scored.metrics["val_perplexity"] == pytest.approx(24)
    assert (training.steps_claimed, training.tokens_claimed) == (3, 1200)
    assert training.loss_claimed == 3.5
    assert not training.stopped_at_budget
    assert training.exit_code == 0
    assert training.startup_seconds > 0
    assert scored.startup_seconds > 0
    parts = training.startup_seconds + training.training_seconds
    parts += scored.startup_seconds + scored.scoring_seconds
    assert found.total_seconds == pytest.approx(parts + found.overhead_seconds)
    details = json.loads((tmp_path / "job" / "evaluation.json").read_text())
    assert details["evaluation"]["metrics"] == dict(scored.metrics)
    assert details["training"]["status"] == "OK"
    assert (tmp_path / "job" / "artefacts" / "model.safetensors").is_file()


def test_a_run_frozen_at_its_budget_with_a_checkpoint_is_good(run: Run) -> None:
    found = run("time.sleep(60)\n", training={"budget_seconds": 1.5, "max_steps": None})
    assert (found.training.status, found.training.message) == (Status.OK, "")
    assert found.training.stopped_at_budget
    assert found.training.exit_code is None
    assert 1.5 <= found.training.training_seconds < 6
    assert found.evaluation is not None
    assert found.evaluation.status is Status.OK


def test_a5_a_run_frozen_without_a_checkpoint_timed_out(run: Run) -> None:
    found = run(train="while True: pass\n", training={"budget_seconds": 0.5})
    assert (found.training.status, found.training.reason) == (
        Status.TIMED_OUT,
        Reason.NO_CHECKPOINT,
    )
    assert found.evaluation is None
    assert found.training.artefacts is None


def test_b29_an_empty_train_py_leaves_no_checkpoint(run: Run) -> None:
    found = run(train="")
    assert (found.training.status, found.training.reason) == (Status.CRASHED, Reason.NO_CHECKPOINT)


def test_a_crash_is_a_crash_even_with_a_checkpoint(run: Run, tmp_path: Path) -> None:
    found = run("print('\\x1b[31mred\\x1b[0m\\x07')\nraise ValueError('no more')\n")
    assert (found.training.status, found.training.reason) == (Status.CRASHED, Reason.EXCEPTION)
    assert "ValueError: no more" in found.training.message
    assert "Traceback" in found.training.log_tail
    assert "red\n" in found.training.log_tail
    assert "\x1b" not in found.training.log_tail
    assert (tmp_path / "job" / "train.log").read_text() == found.training.log_tail
    assert found.evaluation is None


def test_a_crash_by_a_signal_says_which(run: Run) -> None:
    found = run("import signal\nos.kill(os.getpid(), signal.SIGABRT)\n")
    assert (found.training.status, found.training.reason) == (Status.CRASHED, Reason.SIGNAL)
    assert "Abort" in found.training.message


def test_a3_a_run_that_eats_its_memory_is_out_of_memory(run: Run) -> None:
    eat = "block = torch.ones(400 << 18)\ntime.sleep(30)\n"  # 400 MB, all of it touched
    found = run(eat, training={"memory_mb": 500})
    assert (found.training.status, found.training.reason) == (Status.OUT_OF_MEMORY, Reason.MEMORY)
    assert found.evaluation is None


def test_b21_a_pickle_in_the_checkpoint_is_not_executed(run: Run, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = f"""
class Bomb:
    def __reduce__(self):
        return (open, ({str(mark)!r}, "w"))
torch.save(Bomb(), out / "model.safetensors")
"""
    found = run(bomb)
    assert (found.training.status, found.training.reason) == (Status.REJECTED, Reason.ARTEFACT)
    assert not mark.exists()


def test_b22_a_header_that_lies_is_rejected(run: Run) -> None:
    lie = """
header = b'{"table":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}'
(out / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
"""
    found = run(lie)
    assert (found.training.status, found.training.reason) == (Status.REJECTED, Reason.ARTEFACT)


def test_c1_a_link_in_the_place_of_a_checkpoint_is_rejected(run: Run, tmp_path: Path) -> None:
    link = "(out / 'model.json').unlink()\n(out / 'model.json').symlink_to('/etc/hostname')\n"
    found = run(link)
    assert (found.training.status, found.training.reason) == (Status.REJECTED, Reason.ARTEFACT)
    assert not (tmp_path / "job" / "artefacts" / "model.json").exists()


def test_c3_a_checkpoint_beyond_the_limit_is_rejected(run: Run) -> None:
    # No single write is too large: the file is given its size by a hole.
    huge = "os.truncate(out / 'model.safetensors', (1 << 20) + 1)\n"
    found = run(huge, training={"file_mb": 2})
    assert found.training.status is Status.REJECTED
    found = run("open(out / 'model.json', 'ab').truncate(2 << 20)\n", training={"file_mb": 8})
    assert (found.training.status, found.training.reason) == (Status.REJECTED, Reason.ARTEFACT)


def test_c9_a_truncated_checkpoint_costs_only_its_run(run: Run) -> None:
    cut = "os.truncate(out / 'model.safetensors', 300)\n"
    found = run(cut)
    assert (found.training.status, found.training.reason) == (Status.CRASHED, Reason.NO_CHECKPOINT)
    found = run(cut + "time.sleep(60)\n", training={"budget_seconds": 1.5})
    assert (found.training.status, found.training.reason) == (
        Status.TIMED_OUT,
        Reason.NO_CHECKPOINT,
    )


def test_b16_weights_that_are_no_numbers_are_rejected_before_scoring(run: Run) -> None:
    found = run(
        "save_file({'table': torch.full((24, 24), float('nan'))}, out / 'model.safetensors')"
    )
    assert (found.training.status, found.training.reason) == (Status.REJECTED, Reason.NONFINITE)
    assert found.evaluation is None


def test_b1_b2_what_a_genome_prints_or_writes_is_no_metric(run: Run) -> None:
    honest = run().evaluation
    boast = """
print('val_perplexity 1.0')
print(json.dumps({"val_perplexity": 1.0, "val_bpb": 0.5, "mfu": 0.99}))
for name in ("metrics.json", "evaluation.json", "DONE"):
    (out / name).write_text(json.dumps({"val_perplexity": 1.0, "status": "OK"}))
with open(out / "progress.jsonl", "a") as file:
    file.write(json.dumps({"step": 4, "tokens": 9999, "loss": 0.0, "val_perplexity": 1.0}) + "\\n")
"""
    boasting = run(boast)
    assert honest is not None
    assert boasting.evaluation is not None
    assert boasting.evaluation.metrics == honest.metrics
    assert boasting.training.loss_claimed == 0.0  # noted as a claim


def test_b12_training_sees_the_train_split_and_no_other(run: Run) -> None:
    look = """
seen = sorted(str(p.relative_to(out.parent)) for p in out.parent.rglob("*"))
print([p for p in seen if p.startswith(("in/", "job"))])
print(sorted(job))
"""
    log = run(look, evaluation={"n_prefixes": 0}).training.log_tail
    assert "['in/train.bin', 'job.json']" in log
    assert "secret" not in log
    assert "held_out" not in log


def test_a_second_attempt_starts_with_an_empty_folder(run: Run, tmp_path: Path) -> None:
    assert run().training.status is Status.OK
    assert run(train="").training.status is Status.CRASHED
    assert not (tmp_path / "job" / "artefacts" / "model.safetensors").exists()


def test_a_start_that_never_becomes_ready_is_our_failure(run: Run) -> None:
    with pytest.raises(InfrastructureFailure):
        run(training={"startup_seconds": 0.0})


# --- claims ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", (None, None, None)),
        (b'{"step": 1, "tokens": 5, "loss": 2.5}\n', (1, 5, 2.5)),
        (b'{"step": 1, "tokens": 5, "loss": 2}\n{"step": 2, "tok', (1, 5, 2.0)),
        (b'{"step": 1, "tokens": 5, "loss": NaN}\n', (1, 5, None)),
        (b'{"step": true, "tokens": -5, "loss": 1}\n', (None, None, None)),
        (b'{"step": 1e9, "tokens": 7}\n[1]\nnull\n', (None, 7, None)),
        (b'{"step": 1, "tokens": ' + b"9" * 30 + b"}\n", (1, None, None)),
        (b'{"step": 1, "tokens": ' + b"9" * 9_000 + b"}\n", (None, None, None)),
        (b"[" * 50_000, (None, None, None)),
        (b"\xff\x00" * 10_000 + b'\n{"step": 4, "tokens": 8}', (4, 8, None)),
        (b"x" * 1_000_000 + b'\n{"step": 4, "tokens": 8}\n\n', (4, 8, None)),
    ],
)
def test_progress_is_read_defensively(tmp_path: Path, content: bytes, expected: Any) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_bytes(content)
    assert read_progress(path) == expected
    assert read_progress(tmp_path / "missing") == (None, None, None)


# --- what no real machine does on demand ----------------------------------------------------------


class ScriptedGroup:
    """A group that ended long ago, in a way that is set beforehand."""

    startup_seconds = 0.1
    ready_at = 0.0

    def __init__(self, ending: Exit, checkpoint: Path) -> None:
        self.ending, self.checkpoint = ending, checkpoint

    def wait(self, seconds: float) -> bool:
        return True

    def send(self, data: bytes, deadline: float) -> None:
        raise EOFError

    def receive(self, n_bytes: int, deadline: float) -> bytes:
        raise EOFError

    def freeze(self) -> None:
        pass

    def collect(self, names: Iterable[str], destination: Path, max_bytes: int) -> dict[str, str]:
        for path in self.checkpoint.iterdir():
            (destination / path.name).write_bytes(path.read_bytes())
        return {}

    def log(self) -> tuple[str, bool]:
        return "", False

    def close(self) -> Exit:
        return self.ending


class ScriptedSandbox:
    name = "scripted"

    def __init__(self, group: ScriptedGroup) -> None:
        self.group = group
        self.launched: list[Launch] = []

    def warm_up(self) -> None:
        pass

    def start(self, launch: Launch) -> ScriptedGroup:
        import time

        self.launched.append(launch)
        self.group.ready_at = time.monotonic() - 10.0
        return self.group

    def close(self) -> None:
        pass


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    import numpy as np
    from safetensors.numpy import save_file

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"a": np.ones(2, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "model.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("delay", "max_steps", "contended"), [(2.0, None, True), (0.5, None, False), (2.0, 100, False)]
)
def test_a_slot_that_others_used_is_told_under_wall_clock_budgets(
    make_job: MakeJob, checkpoint: Path, delay: float, max_steps: int | None, contended: bool
) -> None:
    sandbox = ScriptedSandbox(ScriptedGroup(Exit(0, run_delay_seconds=delay), checkpoint))
    job = replace(make_job(training={"max_steps": max_steps}), evaluation=None)
    found = run_job(job, sandbox, Scorer())
    assert found.training.status is Status.OK
    assert found.evaluation is None
    assert found.contended is contended


@pytest.mark.parametrize(("cpu_seconds", "fair"), [(10.5, True), (19.0, False)])
def test_b28_who_used_more_than_its_slot_has_is_rejected(
    make_job: MakeJob, checkpoint: Path, cpu_seconds: float, fair: bool
) -> None:
    """The scripted group trained for ten seconds, with one thread."""
    sandbox = ScriptedSandbox(ScriptedGroup(Exit(0, cpu_seconds=cpu_seconds), checkpoint))
    job = replace(make_job(training={"threads": 1, "max_steps": 5}), evaluation=None)
    found = run_job(job, sandbox, Scorer()).training
    expected = (Status.OK, Reason.NONE) if fair else (Status.REJECTED, Reason.RESOURCES)
    assert (found.status, found.reason) == expected
    assert fair or "19.0 s of CPU time in 10.0 s" in found.message


def test_d16_what_was_stopped_long_after_its_budget_does_not_count(
    make_job: MakeJob, checkpoint: Path
) -> None:
    """As when this machine is put to sleep: the training had more time than anybody else's."""
    job = replace(make_job(training={"budget_seconds": 2.0}), evaluation=None)
    with pytest.raises(InfrastructureFailure, match=r"stopped 8\.\d s after the end of its budget"):
        run_job(job, ScriptedSandbox(ScriptedGroup(Exit(0), checkpoint)), Scorer())
    control = replace(job, training=replace(job.training, budget_seconds=9.0))
    found = run_job(control, ScriptedSandbox(ScriptedGroup(Exit(0), checkpoint)), Scorer())
    assert found.training.status is Status.OK


def test_a4_a_child_out_of_memory_counts_before_the_exit_code(
    make_job: MakeJob, checkpoint: Path
) -> None:
    sandbox = ScriptedSandbox(ScriptedGroup(Exit(0, out_of_memory=True), checkpoint))
    found = run_job(make_job(), sandbox, Scorer())
    assert (found.training.status, found.evaluation) == (Status.OUT_OF_MEMORY, None)


def test_a_group_that_vanished_is_our_failure(make_job: MakeJob, checkpoint: Path) -> None:
    sandbox = ScriptedSandbox(ScriptedGroup(Exit(None), checkpoint))
    with pytest.raises(InfrastructureFailure):
        run_job(make_job(), sandbox, Scorer())


def test_a_launch_tells_a_genome_no_secret_and_shows_it_one_file(
    make_job: MakeJob, checkpoint: Path
) -> None:
    sandbox = ScriptedSandbox(ScriptedGroup(Exit(0), checkpoint))
    job = replace(make_job(), evaluation=None)
    run_job(job, sandbox, Scorer())
    (launch,) = sandbox.launched
    assert launch.zone is Zone.TRAIN
    assert dict(launch.inputs) == {"train.bin": job.data.folder / "train.bin"}
    assert set(launch.job) == {
        "budget_seconds",
        "max_steps",
        "seed",
        "device",
        "threads",
        "vocab_size",
        "context_length",
        "train",
        "token_bytes",
        "extra_train",
        "out",
    }


def test_a_lost_scoring_is_not_held_against_the_candidate(
    make_job: MakeJob, checkpoint: Path
) -> None:
    class Broken:
        def evaluate(self, *_: Any) -> Evaluation:
            raise InfrastructureFailure("no model server")

    sandbox = ScriptedSandbox(ScriptedGroup(Exit(0), checkpoint))
    with pytest.raises(InfrastructureFailure, match="no model server"):
        run_job(make_job(), sandbox, Broken())
