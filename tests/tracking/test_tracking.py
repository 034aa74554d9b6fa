"""MLflow as a projection of the journal: complete, without doubles, and never in the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.protocols import Event, Tracker
from darwin_exp.tracking import MlflowTracker, NullTracker, initialise_store

# MLflow's own use of SQLAlchemy is what warns here, not this project.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

RUN_ID = "2026-01-02_03-04-05-baseline"
BEGAN = 1_767_000_000.0
CHROMIUM = shutil.which("chromium")


class FakeRun:
    """The events and files of a small evolution, written as a real one would leave them."""

    def __init__(self, folder: Path, n_individuals: int = 5) -> None:
        self.folder = folder / "runs" / RUN_ID
        self.folder.mkdir(parents=True)
        self.store = folder / "store" / "mlflow.db"
        self.events: list[Event] = []
        self._add(
            "run",
            "run",
            {
                "config": {
                    "seed": 0,
                    "trainer": {"name": "baseline", "rates": [1e-3]},
                    "x": "y" * 9000,
                },
                "environment": {"torch": "2.13.0"},
                "environment_id": "e1",
                "base_genome_id": "b0",
            },
            {"run_id": RUN_ID, "command": "python -m darwin_exp +experiment=baseline"},
        )
        self.names = [f"g{number // 3:02d}-i{number % 3:02d}" for number in range(n_individuals)]
        for number, name in enumerate(self.names):
            self._individual(number, name)
        for count in range(2):
            self._add(
                "job",
                f"g00-i00/repeat-{count}",
                {
                    "purpose": "base_repeat",
                    "individual_id": "g00-i00",
                    "metrics": {"val_perplexity": 10.0 + count},
                },
                {"rates": {"mfu": 0.2}},
            )
        for generation in range(2):
            self._add(
                "generation",
                str(generation),
                {
                    "generation": generation,
                    "survivors": self.names[:2],
                    "best_id": "g00-i02",
                    "best": {"val_perplexity": 9.0 - generation},
                    "mean": {"val_perplexity": 9.5},
                },
                {"seconds": 3.0, "best": {"mfu": 0.25}, "mean": {"mfu": 0.2}},
            )
        self._add("something_new", "1", {}, {})
        self._add(
            "claim",
            "claim",
            {
                "baseline_id": "g00-i00",
                "selected_id": "g00-i02",
                "claim": {
                    "n_base": 4,
                    "perplexity_percent": 8.5,
                    "ci95": [6.0, 11.0],
                    "p_value": 0.01,
                    "significant": True,
                },
            },
            {},
        )
        (self.folder / "summary.json").write_text("{}")
        (self.folder / "champion").mkdir()
        (self.folder / "champion" / "train.py").write_text("pass\n")
        # Apart, because plots are drawn at the end and most tests have no need of them.
        end = {"status": "finished", "exit_code": 0}
        number = len(self.events) + 1
        self.end = Event(number, "end", "end", end, {"seconds": 99.0}, BEGAN + number)

    def tracker(self, **more: Any) -> MlflowTracker:
        return MlflowTracker(
            f"sqlite:///{self.store}",
            self.store.parent / "artifacts",
            "baseline",
            self.folder,
            {"darwin.note": "fake"},
            **more,
        )

    def _add(self, kind: str, key: str, payload: dict[str, Any], measured: dict[str, Any]) -> None:
        number = len(self.events) + 1
        self.events.append(Event(number, kind, key, payload, measured, BEGAN + number))

    def _individual(self, number: int, name: str) -> None:
        is_ok = number != 1
        folder = self.folder / "individuals" / name
        (folder / "code").mkdir(parents=True)
        (folder / "code" / "train.py").write_text(f"# {name}\n")
        for file in ("change.patch", "memory.json", "evaluation.json", "train.log"):
            (folder / file).write_text(f"{file} of {name}\n")
        (folder / "model.safetensors").write_text("not to be uploaded")
        if not is_ok:
            (folder / "error.txt").write_text("Traceback\n")
        edit = {"operator": "squared_relu", "file": "model.py", "why": "sparser", "parameters": {}}
        self._add(
            "individual",
            name,
            {
                "individual_id": name,
                "generation": number // 3,
                "slot": number % 3,
                "parent_ids": ["g00-i00"] if number else [],
                "editor_id": "g00-i00" if number else None,
                "edits": [edit] if number else [],
                "n_new_edits": 1 if number else 0,
                "summary": "squared ReLU \udc80" if number else "",
                "status": "OK" if is_ok else "CRASHED",
                "reason": "none" if is_ok else "exception",
                "message": "" if is_ok else "ValueError: no",
                "metrics": {"val_perplexity": 10.0 - number, "val_bpb": 2.0} if is_ok else {},
                "fitness": number - 10.0 if is_ok else None,
                "attempts": 1,
                "repaired": False,
            },
            {
                "rates": {"mfu": 0.2, "tokens_per_second": 20000.0} if is_ok else {},
                "startup_seconds": 0.5,
                "training_seconds": 12.0,
                "scoring_seconds": 1.0,
                "overhead_seconds": 0.1,
                "contended": False,
            },
        )


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised store, made once: building the tables is most of a test's time."""
    folder = tmp_path_factory.mktemp("empty")
    initialise_store(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture
def run(tmp_path: Path, empty_store: Path) -> FakeRun:
    fake = FakeRun(tmp_path)
    fake.store.parent.mkdir()
    shutil.copy(empty_store, fake.store)
    return fake


def deliver(run: FakeRun, events: list[Event], seconds: float = 60.0) -> int:
    tracker = run.tracker()
    for event in events:
        tracker.follow(event)
    remaining = tracker.close(seconds)
    print("last error:", tracker.last_error)  # which pytest shows where a test fails
    return remaining


def runs_in(store: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store}")
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, max_results=1000))


def by_individual(store: Path) -> dict[str, Any]:
    found = runs_in(store)
    named = {run.data.tags.get("individual_id", "parent"): run for run in found}
    assert len(named) == len(found), "an individual has two runs"
    return named


def history(store: Path, run_id: str, metric: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    points = MlflowClient(f"sqlite:///{store}").get_metric_history(run_id, metric)
    return [(point.step, point.value) for point in points]


def artifacts_of(run: Any) -> set[str]:
    from urllib.parse import unquote, urlparse

    root = Path(unquote(urlparse(run.info.artifact_uri).path))
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


class TestEveryTracker:
    """What the evolution may rely on, whichever tracker was chosen."""

    @pytest.fixture(params=["none", "mlflow", "mlflow without a store"])
    def make(self, request: pytest.FixtureRequest, run: FakeRun) -> Callable[[], Tracker]:
        if request.param == "none":
            return NullTracker
        if request.param == "mlflow without a store":
            run.store.unlink()
            run.store.parent.rmdir()
            run.store.parent.write_text("a file where the store's folder should be")
        return run.tracker

    def test_following_returns_at_once_and_never_raises(
        self, make: Callable[[], Tracker], run: FakeRun
    ) -> None:
        tracker = make()
        began = time.monotonic()
        for event in [*run.events, *run.events]:
            tracker.follow(event)
        assert time.monotonic() - began < 1.0
        tracker.close(0.0)

    def test_closing_keeps_to_its_deadline_and_counts_what_remains(
        self, make: Callable[[], Tracker], run: FakeRun
    ) -> None:
        tracker = make()
        for event in run.events:
            tracker.follow(event)
        began = time.monotonic()
        remaining = tracker.close(0.2)
        assert time.monotonic() - began < 3.0
        assert 0 <= remaining <= len(run.events)
        if run.store.parent.is_file():
            assert remaining == len(run.events)

    def test_closing_twice_and_following_afterwards_do_no_harm(
        self, make: Callable[[], Tracker], run: FakeRun
    ) -> None:
        tracker = make()
        tracker.close(0.1)
        tracker.follow(run.events[0])
        tracker.close(0.1)


def test_a_run_of_events_becomes_exactly_its_runs(run: FakeRun) -> None:
    assert deliver(run, [*run.events, run.end]) == 0
    found = by_individual(run.store)
    assert set(found) == {"parent", *run.names}
    parent = found["parent"]
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == RUN_ID
    assert parent.data.params["trainer.name"] == "baseline"
    assert parent.data.params["environment.torch"] == "2.13.0"
    assert len(parent.data.params["x"]) < 6000
    assert parent.data.tags["darwin.environment_id"] == "e1"
    assert parent.data.tags["darwin.note"] == "fake"
    assert parent.data.tags["claim_significant"] == "True"
    assert parent.data.metrics["claim_ci95_low"] == 6.0
    assert parent.data.metrics["best_mfu"] == 0.25
    assert history(run.store, parent.info.run_id, "best_val_perplexity") == [(0, 9.0), (1, 8.0)]
    repeats = history(run.store, parent.info.run_id, "base_repeat_val_perplexity")
    assert repeats == [(1, 10.0), (2, 11.0)]
    assert artifacts_of(parent) == {
        "plots/perplexity.png",
        "plots/mfu.png",
        "summary.json",
        "champion/train.py",
    }


def test_an_individual_carries_its_tags_metrics_times_and_files(run: FakeRun) -> None:
    assert deliver(run, run.events) == 0
    found = by_individual(run.store)
    good, bad = found["g00-i02"], found["g00-i01"]
    assert good.data.tags["mlflow.parentRunId"] == found["parent"].info.run_id
    assert good.data.tags["generation"] == "0"
    assert good.data.tags["parent_ids"] == "g00-i00"
    assert good.data.tags["editor_id"] == "g00-i00"
    assert good.data.tags["status"] == "OK"
    assert "reason" not in good.data.tags
    assert good.data.metrics["val_perplexity"] == 8.0
    assert good.data.metrics["mfu"] == 0.2
    assert good.data.metrics["fitness"] == -8.0
    assert good.data.params["new_operators"] == "squared_relu"
    assert good.info.run_name.startswith("g00-i02 squared ReLU")
    assert good.info.end_time - good.info.start_time == 13_600
    assert bad.info.status == "FAILED"
    assert bad.data.tags["reason"] == "exception"
    assert "val_perplexity" not in bad.data.metrics
    assert "fitness" not in bad.data.metrics
    wanted = {"code/train.py", "change.patch", "memory.json", "evaluation.json", "train.log"}
    assert artifacts_of(good) == wanted
    assert artifacts_of(bad) == {*wanted, "error.txt"}


def snapshot(store: Path) -> dict[str, Any]:
    return {
        name: (run.info.run_id, run.info.status, run.data.metrics, run.data.params, run.data.tags)
        for name, run in by_individual(store).items()
    }


def count_metric_points(store: Path) -> int:
    connection = sqlite3.connect(store)
    count = connection.execute("SELECT COUNT(*) FROM metrics").fetchone()[0]
    connection.close()
    return int(count)


def test_delivering_everything_again_changes_nothing(run: FakeRun) -> None:
    assert deliver(run, run.events) == 0
    before, points = snapshot(run.store), count_metric_points(run.store)
    (run.folder / "tracking.json").unlink()
    assert deliver(run, run.events) == 0
    assert snapshot(run.store) == before
    assert count_metric_points(run.store) == points


def test_a_resumed_tracker_delivers_only_what_is_new(run: FakeRun) -> None:
    assert deliver(run, run.events[:4]) == 0
    cursor = json.loads((run.folder / "tracking.json").read_text())
    assert cursor["through"] == 4
    # Were the first individual delivered again, this would be mended.
    name = run.names[0]
    shutil.rmtree(run.folder / "individuals" / name)
    assert deliver(run, run.events) == 0
    assert set(by_individual(run.store)) == {"parent", *run.names}


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"store": 1, "through": 9}'])
def test_a_damaged_cursor_only_repeats_deliveries(run: FakeRun, damage: str) -> None:
    assert deliver(run, run.events[:3]) == 0
    (run.folder / "tracking.json").write_text(damage)
    assert deliver(run, run.events) == 0
    assert set(by_individual(run.store)) == {"parent", *run.names}


DELIVER_IN_ANOTHER_PROCESS = """
import pickle, sys
from pathlib import Path
from darwin_exp.tracking import MlflowTracker
store, folder = arguments if "arguments" in globals() else sys.argv[1:]
artifacts = Path(store).parent / "artifacts"
tracker = MlflowTracker(f"sqlite:///{store}", artifacts, "baseline", Path(folder))
for event in pickle.loads((Path(folder) / "events.pickle").read_bytes()):
    tracker.follow(event)
remaining = tracker.close(120)
print(remaining, flush=True)
sys.exit(remaining)
"""


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that begin with mlflow already imported, which is most of what they would do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["darwin_exp.tracking", "mlflow.store.tracking.sqlalchemy_store"]
    )
    return context


def start_delivery(processes: Any, run: FakeRun) -> Any:
    (run.folder / "events.pickle").write_bytes(pickle.dumps(run.events))
    names = {"arguments": [str(run.store), str(run.folder)]}
    process = processes.Process(target=exec, args=(DELIVER_IN_ANOTHER_PROCESS, names))
    process.start()
    return process


def test_a_killed_tracker_leaves_no_gap_and_no_double(run: FakeRun, processes: Any) -> None:
    process = start_delivery(processes, run)
    cursor = run.folder / "tracking.json"
    deadline = time.monotonic() + 60
    while not cursor.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.02)
    process.kill()
    process.join()
    through = json.loads(cursor.read_text())["through"]
    assert through < len(run.events), "it was killed too late to show anything"
    assert deliver(run, run.events) == 0
    found = by_individual(run.store)
    assert set(found) == {"parent", *run.names}
    parent = found.pop("parent")
    assert parent.info.status == "RUNNING", "its end was not among the events"
    assert {run.info.status for run in found.values()} == {"FINISHED", "FAILED"}
    assert all(artifacts_of(run) >= {"code/train.py", "train.log"} for run in found.values())


def test_mlflow_says_nothing_on_the_terminal(run: FakeRun) -> None:
    run.store.unlink()  # also while it builds its tables
    (run.folder / "events.pickle").write_bytes(pickle.dumps(run.events[:2]))
    done = subprocess.run(
        [sys.executable, "-c", DELIVER_IN_ANOTHER_PROCESS, str(run.store), str(run.folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_five_processes_may_open_a_fresh_store_at_once(tmp_path: Path, processes: Any) -> None:
    started = []
    for number in range(5):
        fake = FakeRun(tmp_path / str(number), n_individuals=1)
        fake.folder = fake.folder.rename(fake.folder.with_name(f"run-{number}"))
        fake.store = tmp_path / "mlflow.db"
        started.append(start_delivery(processes, fake))
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * 5
    assert len(runs_in(tmp_path / "mlflow.db")) == 10


@pytest.fixture
def locked(run: FakeRun) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(run.store, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield connection
    connection.close()


def test_what_a_locked_store_refused_is_delivered_once_it_is_free(
    run: FakeRun, locked: sqlite3.Connection
) -> None:
    tracker = run.tracker()
    for event in run.events:
        tracker.follow(event)
    assert not tracker.ready(1.5)
    assert "locked" in tracker.last_error
    locked.execute("ROLLBACK")
    assert tracker.close(60) == 0
    assert set(by_individual(run.store)) == {"parent", *run.names}


def test_what_remained_at_the_end_is_delivered_at_the_next_start(run: FakeRun) -> None:
    aside = run.store.parent.rename(run.store.parent.with_name("aside"))
    run.store.parent.write_text("not a folder")
    assert deliver(run, run.events, seconds=1.0) == len(run.events)
    run.store.parent.unlink()
    aside.rename(run.store.parent)
    assert deliver(run, run.events) == 0
    assert set(by_individual(run.store)) == {"parent", *run.names}


def test_a_store_deleted_during_the_run_is_built_again(run: FakeRun, tmp_path: Path) -> None:
    tracker = run.tracker()
    for event in run.events[:4]:
        tracker.follow(event)
    deadline = time.monotonic() + 30
    while tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    run.store.unlink()
    for event in run.events[4:]:
        tracker.follow(event)
    assert tracker.close(60) == 0
    copy = shutil.copy(run.store, tmp_path / "copy.db")  # another address: MLflow keeps stores
    assert set(by_individual(Path(copy))) == {"parent", *run.names}


def test_an_event_that_a_working_store_refuses_holds_up_no_other(run: FakeRun) -> None:
    broken = Event(3, "generation", "x", {"generation": "not a number"}, {}, BEGAN)
    events = [*run.events[:2], broken, *run.events[3:]]
    assert deliver(run, events) == 1
    assert set(by_individual(run.store)) == {"parent", *run.names} - {run.names[1]}
    assert json.loads((run.folder / "tracking.json").read_text())["missing"] == [3]
    assert deliver(run, run.events) == 0, "what was refused is tried again at the next start"
    assert set(by_individual(run.store)) == {"parent", *run.names}


def test_an_interrupted_run_is_killed_and_a_resumed_one_runs_again(run: FakeRun) -> None:
    ended = Event(50, "end", "1", {"status": "interrupted", "exit_code": 130}, {}, BEGAN + 50)
    assert deliver(run, [*run.events[:4], ended]) == 0
    assert by_individual(run.store)["parent"].info.status == "KILLED"
    resumed = Event(51, "session", "2", {"what": "resumed"}, {}, BEGAN + 60)
    assert deliver(run, [*run.events[:4], ended, resumed]) == 0
    assert by_individual(run.store)["parent"].info.status == "RUNNING"


def test_runs_of_a_sweep_share_one_parent(run: FakeRun) -> None:
    for name in ("first", "second"):
        run.folder = run.folder.rename(run.folder.with_name(name))
        (run.folder / "tracking.json").unlink(missing_ok=True)
        tracker = run.tracker(sweep_id="sweep-1")
        for event in run.events[:2]:
            tracker.follow(event)
        assert tracker.close(60) == 0
    found = runs_in(run.store)
    sweeps = [r for r in found if r.data.tags.get("darwin.role") == "sweep"]
    evolutions = [r for r in found if r.data.tags.get("darwin.role") == "evolution"]
    assert len(sweeps) == 1
    parents = {r.data.tags["mlflow.parentRunId"] for r in evolutions}
    assert len(evolutions) == 2
    assert parents == {sweeps[0].info.run_id}


@pytest.fixture
def server(run: FakeRun) -> Iterator[str]:
    """MLflow's own server on the run's store; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{run.store}"]
    process = subprocess.Popen(
        command,
        cwd=run.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(480):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended by itself"
                time.sleep(0.25)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
def test_a_person_finds_the_run_and_its_agents_in_the_ui(
    run: FakeRun, server: str, tmp_path: Path
) -> None:
    assert deliver(run, [*run.events, run.end]) == 0
    parent = by_individual(run.store)["parent"].info
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=30000",
        "--dump-dom",
    ]

    def dom(page: str) -> str:
        address = f"{server}/#/experiments/{parent.experiment_id}{page}"
        done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
        return done.stdout

    assert RUN_ID in dom("/runs")
    of_the_run = dom(f"/runs/{parent.run_id}")
    assert "g00-i02 squared ReLU" in of_the_run
    assert "best_val_perplexity" in of_the_run
