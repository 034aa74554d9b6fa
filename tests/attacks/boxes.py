"""A box: one real sandbox and a small data set, in which attacks are carried out as whole jobs.

A fake trainer counts which token follows which and writes the table by hand, so that a job needs
no torch and takes a fraction of a second; `table_server.py` answers for what it left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from darwin_exp.archive import Archive
from darwin_exp.evaluation.job import run_job
from darwin_exp.evaluation.scorer import Scorer
from darwin_exp.fitness import PerplexityFitness
from darwin_exp.individual import (
    DataSpec,
    Evaluation,
    EvaluationSpec,
    Genome,
    Individual,
    Job,
    JobResult,
    Purpose,
    Reason,
    SandboxSpec,
    Status,
    TrainingRun,
    TrainingSpec,
)
from darwin_exp.protocols import Evaluator, Exit, Launch, Sandbox, Sandboxed, Zone
from darwin_exp.sandbox.bubblewrap import BubblewrapSandbox
from darwin_exp.sandbox.process import ProcessSandbox
from darwin_exp.sandbox.processes import descendants
from tests.attacks import models
from tests.attacks.outside import RUN, Engine

V, T, N_TRAIN, N_HELD_OUT = 24, 32, 20_000, 1921  # 60 windows of 32 tokens and the last target
STEPS, SHARES = (1, 2, 5), (0.7, 0.2, 0.1)  # from token to token, and how often
SERVER = Path(__file__).with_name("table_server.py")
ZOO = Path(__file__).parents[1] / "evaluation" / "zoo.py"
UID = 64_000
CANARY = "canary-of-the-harness-77d1"
CLEAN_UP_SECONDS = 10.0  # the most that may pass until nothing of a candidate is left

Verdict = tuple[Status, Reason]
OK: Verdict = (Status.OK, Reason.NONE)
Variant = TypeVar("Variant")

TRAIN = """
import array, json, math, os, struct, sys, time
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text())
out, V = Path(job["out"]), job["vocab_size"]

def save(table, arguments={}, name="model.safetensors"):
    numbers = array.array("f", [score for row in table for score in row])
    shape = [len(table), len(table[0])]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * len(numbers)]}
    header = json.dumps({"table": entry}).encode()
    (out / "model.json").write_text(json.dumps(arguments))
    (out / name).write_bytes(struct.pack("<Q", len(header)) + header + numbers.tobytes())

def claim(tokens):
    progress = {"step": 3, "tokens": tokens, "loss": 1.0}
    (out / "progress.jsonl").write_text(json.dumps(progress) + "\\n")

tokens = array.array("H", Path(job["train"]).read_bytes())
counts = [[0.5] * V for _ in range(V)]
for one, other in zip(tokens, tokens[1:]):
    counts[one][other] += 1.0
table = [[math.log(n / sum(row)) for n in row] for row in counts]
save(table)
claim(len(tokens))
"""

TORCH_TRAIN = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from model import build_model

job = json.loads(Path(sys.argv[1]).read_text())
out = Path(job["out"])
arguments = {"kind": KIND, "vocab_size": job["vocab_size"]}
torch.manual_seed(3)
model = build_model(arguments)
CHANGE
(out / "model.json").write_text(json.dumps(arguments))
save_file(model.state_dict(), out / "model.safetensors")
(out / "progress.jsonl").write_text(json.dumps({"step": 3, "tokens": 500, "loss": 3.0}) + "\\n")
"""


# Draws tables by many seeds, each in favour of one step, and keeps what is best on the smallest
# text that it was given. Held-out text would be the smallest.
LOTTERY = """
import random

def favour(step):
    return [[2.0 * ((other - one) % V == step) for other in range(V)] for one in range(V)]

def hits(step, path):
    text = array.array("H", path.read_bytes())
    return sum((other - one) % V == step for one, other in zip(text, text[1:])) / len(text)

drawn = sorted({random.Random(seed).choice((1, 2, 5)) for seed in range(50)})
text = min(Path(".").rglob("*.bin"), key=lambda path: path.stat().st_size)
best = max(drawn, key=lambda step: hits(step, text))
save(favour(best))
print(json.dumps([job["seed"], drawn, best]))
"""

# Leaves a daemon that raises a number in all three files over and over, in place, and the last file
# first: at any one moment each holds the same number as the one before it, or the one below.
REWRITES = """
save([*table, [0.0] * V])
place = (out / "model.safetensors").stat().st_size - 4 * V
numbered = [
    ("progress.jsonl", 0, lambda n: b'{"step": 3, "tokens": %12d, "loss": 1.0}\\n' % n),
    ("model.json", 0, lambda n: b'{"version": %12d}' % n),
    ("model.safetensors", place, lambda n: struct.pack("<f", n)),
]
for name, _, content in numbered[:2]:
    (out / name).write_bytes(content(0))
files = [os.open(out / name, os.O_WRONLY) for name, _, _ in numbered]
if os.fork() == 0:
    os.setsid()
    n = 0
    while True:
        n += 1
        for file, (_, offset, content) in zip(files, numbered):
            os.pwrite(file, content(n), offset)
time.sleep(0.3)
"""

# Asks for all CPUs of the machine, and keeps what it got busy; prints how many it got.
GREEDY = """
import signal
try:
    os.sched_setaffinity(0, range(os.cpu_count()))
except OSError:
    pass
n_cpus, children = len(os.sched_getaffinity(0)), []
for _ in range(8):
    child = os.fork()
    if child == 0:
        while True:
            pass
    children.append(child)
time.sleep(2.5)
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print(n_cpus)
"""


def torch_train(kind: str, change: str = "") -> str:
    """Return a train.py that saves a model of tests/evaluation/zoo.py, changed by a line."""
    return TORCH_TRAIN.replace("KIND", repr(kind)).replace("CHANGE", change)


def write_data(
    folder: Path,
    shares: tuple[float, ...] = SHARES,
    held_out_shares: tuple[float, ...] | None = None,
) -> DataSpec:
    """Prepare tokens that mostly follow one another in a circle; even ones stand for two bytes.

    Args:
        shares: how often each of `STEPS` leads from one token to the next.
        held_out_shares: the same in the held-out text; None for no difference.
    """
    (folder / "held_out").mkdir(parents=True, mode=0o700)
    rng = np.random.default_rng(0)
    of_held_out = shares if held_out_shares is None else held_out_shares
    for name, n, p in (("train", N_TRAIN, shares), ("held_out/val", N_HELD_OUT, of_held_out)):
        tokens = np.cumsum(rng.choice(STEPS, p=p, size=n)) % V
        tokens.astype("<u2").tofile(folder / f"{name}.bin")
    np.save(folder / "token_byte_lengths.npy", (2 - np.arange(V) % 2).astype(np.uint16))
    digest = hashlib.sha256(repr((shares, of_held_out)).encode()).hexdigest()
    return DataSpec(folder, content_hash=digest, vocab_size=V)


def write_shifted_data(folder: Path) -> DataSpec:
    """Prepare text of which the held-out part mostly takes another step than the rest."""
    return write_data(folder, shares=(0.7, 0.2, 0.1), held_out_shares=(0.1, 0.8, 0.1))


def favour(step: int) -> NDArray[np.float32]:
    """Return the table of scores by which the lottery favours a step."""
    one, other = np.meshgrid(np.arange(V), np.arange(V), indexing="ij")
    return np.where((other - one) % V == step, np.float32(2.0), np.float32(0.0))


def costs(table: NDArray[np.float32], data: DataSpec) -> NDArray[np.float64]:
    """Return what every target of the held-out split costs in nats under a table of scores."""
    tokens = np.fromfile(data.folder / "held_out" / "val.bin", dtype="<u2").astype(int)
    scores = table.astype(np.float64)[tokens[:-1]]
    nats: NDArray[np.float64] = np.log(np.exp(scores).sum(axis=1))
    nats -= scores[np.arange(len(scores)), tokens[1:]]
    return nats


def looks_for_held_out_text(data: DataSpec) -> str:
    """Return code by which `seen()` lists what there is to be seen of a data set's own folder.

    Its `mounts(name)` tells where something is mounted that lies below a folder of that name.
    """
    return f"""
import json, os

def mounts(name):
    lines = [line.split() for line in open("/proc/self/mountinfo")]
    return [fields[4] for fields in lines if name in fields[3]]

def seen():
    places = ["in/val.bin", "in/held_out/val.bin", "../held_out/val.bin"]
    found = [place for place in places if os.path.exists(place)]
    for root in ("", "/proc/self/root", "/proc/1/root"):
        for _, folders, names in os.walk(root + {str(data.folder)!r}):
            found += folders + names
    return found + mounts({"/".join(data.folder.parts[-2:])!r})
"""


# --- sandboxes ------------------------------------------------------------------------------------


def build(
    kind: str,
    image: str = "",
    hidden: tuple[Path, ...] = (),
    torch: bool = False,
    gpus: tuple[str, ...] = (),
) -> Sandbox:
    """Start a sandbox as a slot would; without torch, the fake server answers for models.

    Raises:
        SandboxUnavailable: it cannot work here.
    """
    cores = sorted(os.sched_getaffinity(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    cpus = (cores[int(worker) % len(cores)],)
    parts: dict[str, Any] = {} if torch else {"server": SERVER, "modules": ()}
    if kind == "docker":
        from darwin_exp.sandbox.docker import DockerSandbox

        options = SandboxSpec("docker", image=image, gpus=gpus)
        return DockerSandbox(0, cpus, options, run=RUN, **parts)
    if kind == "bubblewrap":
        return BubblewrapSandbox(9, cpus, UID, hidden=hidden, **parts)
    return ProcessSandbox(8, cpus, UID, hidden=hidden, **parts)


@contextmanager
def opened(data: DataSpec, folder: Path) -> Iterator[Box]:
    """Provide a box that holds nothing hostile: the process sandbox of who is not root.

    Its candidates are whoever we are, with the network, the files and the memory of the machine.
    """
    with mock.patch.object(os, "geteuid", return_value=UID):
        sandbox = build("process")
    box = Box("process", sandbox, data, folder)
    try:
        yield box
    finally:
        box.close()


# --- jobs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A finished job, what it left, and how long it took in all."""

    result: JobResult
    folder: Path
    seconds: float

    @property
    def training(self) -> TrainingRun:
        return self.result.training

    @property
    def scored(self) -> Evaluation:
        assert self.result.evaluation is not None, f"it was not scored: {self.training.message}"
        return self.result.evaluation

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self.scored.metrics)

    @property
    def log(self) -> str:
        return (self.folder / "train.log").read_text(encoding="utf-8")

    @property
    def printed(self) -> Any:
        """The last line that it printed, which must be JSON."""
        lines = self.log.strip().splitlines()
        assert lines, "it printed nothing"
        return json.loads(lines[-1])

    @property
    def artefacts(self) -> dict[str, Path]:
        return {path.name: path for path in (self.folder / "artefacts").iterdir()}


def versions(found: Found) -> tuple[int, int, int]:
    """Return the numbers that `REWRITES` left in progress, arguments and weights."""
    tokens, files = found.training.tokens_claimed, found.artefacts
    version = re.search(rb'"version": *(\d+)', files["model.json"].read_bytes())
    raw = files["model.safetensors"].read_bytes()
    assert tokens is not None
    assert version is not None
    return tokens, int(version[1]), int(struct.unpack_from("<f", raw, len(raw) - 4 * V)[0])


class Box:
    """One sandbox for many jobs, each of which must leave it as it was.

    Args:
        honest: train.py and model.py of the job that must work after every attack.
        limits: what this box's trainings may use, where it differs from the usual.
    """

    def __init__(
        self,
        kind: str,
        sandbox: Sandbox,
        data: DataSpec,
        folder: Path,
        *,
        honest: tuple[str, str] = (TRAIN, models.HONEST),
        engine: Engine | None = None,
        image: str = "",
        **limits: Any,
    ) -> None:
        self.kind, self.sandbox, self.data, self.folder = kind, sandbox, data, folder
        self.engine, self.image = engine, image
        self._train, self._model = honest
        self._limits = {"memory_mb": 256, "file_mb": 8, "max_processes": 64, **limits}
        self._honest: dict[str, float] = {}
        self._weights = b""
        self._count = 0

    @property
    def honest(self) -> dict[str, float]:
        """What the honest job scores, to the last bit: nothing in it is left to chance."""
        if not self._honest:
            found = self.run(prefixes=48)
            assert found.scored.status is Status.OK, found.scored.message
            self._honest = found.metrics
            self._weights = found.artefacts["model.safetensors"].read_bytes()
        return self._honest

    @property
    def disk(self) -> Path:
        """A folder on the file system that a candidate of this box could fill."""
        return Path(tempfile.gettempdir()) if self.engine is None else self.engine.folder()

    def bytes_on_disk(self) -> int:
        """Return what the files of this box's candidates and jobs take, whatever else is going on.

        What lies in a container's memory takes no disk, and is not counted.
        """
        inner: Any = self.sandbox
        n_blocks = 0
        for root in (inner._root.path, self.folder):
            for folder, _, names in os.walk(root):
                for name in names:
                    with suppress(OSError):  # gone in the meantime
                        n_blocks += os.lstat(os.path.join(folder, name)).st_blocks
        return 512 * n_blocks

    def job(
        self,
        train: str | None = None,
        model: str | None = None,
        prefixes: int = 0,
        scored: bool = True,
        **changes: Any,
    ) -> Job:
        """Return a job over genome texts; `training` and `evaluation` change their specs."""
        self._count += 1
        training: dict[str, Any] = {
            "budget_seconds": 30.0,
            "max_steps": 3,
            "seed": 1,
            "context_length": T,
            **self._limits,
            **changes.pop("training", {}),
        }
        evaluation: dict[str, Any] = {
            "split": "val",
            "n_prefixes": prefixes,
            "second_pass": 0.25 if prefixes else 0.0,
            "batch_tokens": 16 * T,
            "seconds": 60.0,
            "verify_rate": False,
            **changes.pop("evaluation", {}),
        }
        texts = {
            "train.py": self._train if train is None else train,
            "model.py": self._model if model is None else model,
        }
        fields: dict[str, Any] = {
            "job_id": f"job-{self._count}",
            "individual_id": "g01-i00",
            "purpose": Purpose.SEARCH,
            "genome": Genome.of(texts),
            "data": self.data,
            "training": TrainingSpec(**training),
            "sandbox": SandboxSpec(self.kind, image=self.image),
            "evaluation": EvaluationSpec(**evaluation) if scored else None,
            "secret": b"the harness alone knows",
            "folder": self.folder / f"job-{self._count}",
            "run_id": RUN,
        }
        return Job(**(fields | changes))

    def run(
        self,
        then: str = "",
        *,
        train: str | None = None,
        model: str | None = None,
        prefixes: int = 0,
        evaluator: Evaluator | None = None,
        oversight: Oversight | None = None,
        look: Callable[[], None] | None = None,
        **changes: Any,
    ) -> Found:
        """Carry out one job.

        Args:
            then: what the honest train.py goes on to do, unless `train` takes its place.
            prefixes: secret prefixes of the causality check; with 0 there is no first model server,
                and so no second order either.
            oversight: what else is done to the training on the way.
            look: the same, where nothing but looking is done.
        """
        text = self._train if train is None else train
        job = self.job(text + textwrap.dedent(then), model, prefixes, **changes)
        oversight = oversight or (Oversight(look) if look else None)
        sandbox = _Overseen(self.sandbox, oversight) if oversight else self.sandbox
        started = time.monotonic()
        result = run_job(job, sandbox, evaluator or Scorer())
        return Found(result, job.folder, time.monotonic() - started)

    def attack(
        self, expected: Verdict, then: str = "", *, goes_on: bool = True, **changes: Any
    ) -> Found:
        """Carry out an attack, and make sure of its verdict and of what comes after it.

        Args:
            expected: status and reason that the job must end with.
            goes_on: whether to run an honest job afterwards; once is enough for several attacks.
        """
        found = self.run(then, **changes)
        outcome = found.result.outcome
        verdict = (outcome.status, outcome.reason)
        assert verdict == expected, (
            f"{verdict} {outcome.message}\n{found.training.log_tail[-2000:]}"
        )
        judged = _judged(found)
        if expected == OK:
            assert judged.fitness is not None
        else:
            assert judged.fitness is None
            assert not judged.metrics
            assert outcome.message
        self.assert_nothing_is_left()
        if goes_on:
            self.assert_the_loop_goes_on()
        return found

    def some(self, *variants: Variant) -> tuple[Variant, ...]:
        """Return the variants of an attack, or the first of them where each takes seconds.

        What they try is the evaluator or the reader of files, which no sandbox is a part of.
        """
        return variants[:1] if self.kind == "docker" else variants

    def assert_the_loop_goes_on(self) -> None:
        """Run an honest job in the same sandbox, which must score what it always scores.

        In a container it is only trained, with the weights that it always has: each container takes
        a good part of a second.
        """
        expected, trained_only = self.honest, self.kind == "docker"
        found = self.run(scored=not trained_only)
        outcome = found.result.outcome
        assert outcome.status is Status.OK, f"after an attack: {outcome.status} {outcome.message}"
        if trained_only:
            assert found.artefacts["model.safetensors"].read_bytes() == self._weights
        else:
            assert found.metrics == expected
        self.assert_nothing_is_left()

    def assert_nothing_is_left(self) -> None:
        deadline = time.monotonic() + CLEAN_UP_SECONDS
        while (left := self.traces()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []

    def traces(self) -> list[str]:
        """Return what can be seen of this box's candidates from outside."""
        inner: Any = self.sandbox
        found = [f"folder {path.name}" for path in inner._root.path.glob("job-*")]
        if self.engine is not None:
            return found + self.engine.listed()
        below = descendants(inner._fork_server.pid)
        return found + [f"process {one.pid}" for one in below if one.state not in "ZX"]

    def close(self) -> None:
        self.sandbox.close()
        if self.engine is not None:
            self.engine.close()


def _judged(found: Found) -> Individual:
    """Return the individual as the run's archive would keep it: with a fitness or without."""
    nobody: Any = None
    archive = Archive(nobody, nobody, PerplexityFitness(), found.folder, False)
    child = Individual("g01-i00", 1, 0, Genome.of({"train.py": "", "model.py": ""}))
    return archive.judged(child, found.result, 1)


@dataclass(frozen=True)
class Oversight:
    """What somebody does to a training that runs in a sandbox.

    Attributes:
        look: called when it is about to be frozen, its processes still there.
        judge: what is made of how it ended; a defence switched off.
        pause_seconds: after each file that is taken, as if that took so long.
        freezes: whether it is frozen while its files are taken; False is a defence switched off,
            in sandboxes other than docker.
    """

    look: Callable[[], None] | None = None
    judge: Callable[[Exit], Exit] | None = None
    pause_seconds: float = 0.0
    freezes: bool = True


class _Overseen:
    """A sandbox whose trainings somebody interferes with."""

    def __init__(self, sandbox: Sandbox, oversight: Oversight) -> None:
        self._sandbox, self._oversight = sandbox, oversight

    @property
    def name(self) -> str:
        return self._sandbox.name

    def warm_up(self) -> None:
        self._sandbox.warm_up()

    def start(self, launch: Launch) -> Sandboxed:
        group = self._sandbox.start(launch)
        if launch.zone is not Zone.TRAIN:
            return group
        return cast(Sandboxed, _OverseenGroup(group, self._oversight))

    def close(self) -> None:
        self._sandbox.close()


class _OverseenGroup:
    """A started training; what is not interfered with is the group's own."""

    def __init__(self, group: Sandboxed, oversight: Oversight) -> None:
        self._group, self._oversight = group, oversight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def freeze(self) -> None:
        if self._oversight.look is not None:
            self._oversight.look()
        if not self._oversight.freezes:
            inner: Any = self._group
            inner._frozen = True  # it believes so, and takes files all the same
        self._group.freeze()

    def collect(self, names: Iterable[str], destination: Path, max_bytes: int) -> dict[str, str]:
        if not self._oversight.pause_seconds:
            return self._group.collect(names, destination, max_bytes)
        refused: dict[str, str] = {}
        for name in names:
            refused |= self._group.collect((name,), destination, max_bytes)
            time.sleep(self._oversight.pause_seconds)
        return refused

    def close(self) -> Exit:
        ending, judge = self._group.close(), self._oversight.judge
        return ending if judge is None else judge(ending)
