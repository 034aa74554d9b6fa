"""People and environments as MLflow shows them, from a journal and an inbox as a run has them."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

from darwin_exp.hitl.inbox import FILE_NAME, Author, Inbox, as_json
from darwin_exp.hitl.requests import (
    Decision,
    Request,
    RequestType,
    answer,
    ask,
    fold,
    hash_of,
)
from darwin_exp.journal import Journal
from darwin_exp.protocols import Event
from darwin_exp.tracking import MlflowTracker, initialise_store
from darwin_exp.tracking.people import in_last_environment

# MLflow's own use of SQLAlchemy is what warns here, not this project.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

ANN = Author("ann", "terminal")
LONG = "z" * 9_000


class Peopled:
    """A small evolution that people take part in, written as a real one writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs" / "260102-0304-people"
        self.folder.mkdir(parents=True)
        self.store = folder / "store" / "mlflow.db"
        self.journal = Journal(self.folder)
        self.inbox = Inbox(self.folder / FILE_NAME)
        self.n_taken = 0
        self.journal.append("session", "0", {"what": "started"}, {"pid": 1})
        payload = {"config": {"seed": 0}, "environment": {}, "environment_id": "e0" * 6}
        self.journal.append("run", "run", payload, {"run_id": self.folder.name})
        self.repeat("g00-i00/0", 10.0)
        self.individual("g00-i00", 10.0)

    @property
    def events(self) -> list[Event]:
        return self.journal.events()

    def individual(self, name: str, perplexity: float, **more: Any) -> None:
        payload = {
            "individual_id": name,
            "generation": int(name[1:3]),
            "slot": int(name[-2:]),
            "parent_ids": [] if name == "g00-i00" else ["g00-i00"],
            "editor_id": None if name == "g00-i00" else "g00-i00",
            "edits": [],
            "n_new_edits": 0,
            "summary": "",
            "status": "OK",
            "reason": "none",
            "message": "",
            "metrics": {"val_perplexity": perplexity, "val_bpb": perplexity / 5},
            "fitness": -perplexity,
            "attempts": 1,
            "repaired": False,
        }
        self.journal.append("individual", name, {**payload, **more}, {"rates": {"mfu": 0.2}})

    def repeat(self, key: str, perplexity: float, **more: Any) -> None:
        payload = {
            "purpose": "base_repeat",
            "individual_id": "g00-i00",
            "metrics": {"val_perplexity": perplexity},
        }
        self.journal.append("job", key, {**payload, **more}, {"rates": {"mfu": 0.2}})

    def generation(self, number: int) -> None:
        payload = {"generation": number, "best": {}, "mean": {}, "survivors": ["g00-i00"]}
        self.journal.append("generation", str(number), payload, {"seconds": 1.0})

    def take(self, point: str) -> None:
        entries = self.inbox.entries(after=self.n_taken)
        self.n_taken += len(entries)
        told = [as_json(entry) for entry in entries]
        self.journal.append("inbox", point, {"upto": self.n_taken, "entries": told})

    def ask(self, content: str, kind: RequestType = RequestType.DATASET) -> Request:
        run_id = self.folder.name
        request = Request(run_id, kind, "more text", "", content, "g00-i00", 1)
        ask(self.inbox, request)
        return request

    def answer(self, request: Request, decision: Decision) -> None:
        standing = fold(self.inbox.entries()).requests[request.request_id]
        answer(self.inbox, standing, decision, ANN, request.content_hash, note="as you like")

    def review(self, key: str, name: str, verdict: str, note: str = "", by: str = "ann") -> None:
        payload = {
            "individual_id": name,
            "request_id": hash_of(key)[:12],
            "verdict": verdict,
            "note": note,
            "by": by,
            "why": "all are",
        }
        measured = {"waited_seconds": 40.0, "idle_seconds": 30.0}
        self.journal.append("review", key, payload, measured)

    def end(self) -> None:
        ended = {"status": "finished", "exit_code": 0}
        self.journal.append("end", "0", ended, {"seconds": 9.0})

    def deliver(self, events: list[Event] | None = None) -> None:
        artifacts = self.store.parent / "artifacts"
        tracker = MlflowTracker(f"sqlite:///{self.store}", artifacts, "baseline", self.folder)
        for event in self.events if events is None else events:
            tracker.follow(event)
        remaining = tracker.close(60.0)
        print("last error:", tracker.last_error)  # which pytest shows where a test fails
        assert remaining == 0

    def run(self, name: str = "parent") -> Any:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.store}")
        experiments = [one.experiment_id for one in client.search_experiments()]
        found = client.search_runs(experiments)
        return {one.data.tags.get("individual_id", "parent"): one for one in found}[name]

    def tags(self, name: str = "parent") -> dict[str, str]:
        found: dict[str, str] = self.run(name).data.tags
        return found

    def history(self, metric: str, name: str = "parent") -> list[tuple[int, float]]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.store}")
        points = client.get_metric_history(self.run(name).info.run_id, metric)
        return [(point.step, point.value) for point in points]

    def people(self) -> list[dict[str, Any]]:
        root = Path(unquote(urlparse(self.run().info.artifact_uri).path))
        found: list[dict[str, Any]] = json.loads((root / "people.json").read_text())
        return found


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty")
    initialise_store(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture
def evolution(tmp_path: Path, empty_store: Path) -> Iterator[Peopled]:
    made = Peopled(tmp_path)
    made.store.parent.mkdir()
    shutil.copy(empty_store, made.store)
    yield made
    made.journal.close()


def n_points(store: Path) -> int:
    with closing(sqlite3.connect(store)) as database:
        return int(database.execute("SELECT COUNT(*) FROM metrics").fetchone()[0])


def a_whole_run(evolution: Peopled) -> tuple[Request, Request]:
    """Let a person grant one thing of three, review two rewrites, and revoke what was granted."""
    asked = [evolution.ask(words) for words in ("poems", "prose", "plays")]
    evolution.take("g01")
    evolution.review("g01-i00/0-0", "g01-i00", "approved")
    evolution.review("g01-i01/0-0", "g01-i01", "denied", f"ann did not approve it: {LONG}")
    evolution.individual("g01-i00", 9.0)
    evolution.individual("g01-i01", 9.5, status="INVALID", metrics={}, fitness=None)
    evolution.generation(1)
    evolution.answer(asked[0], Decision.APPROVE)
    evolution.answer(asked[1], Decision.DENY)
    evolution.take("g02")
    effect = {
        "request_id": asked[0].request_id,
        "type": "dataset",
        "generation": 2,
        "outcome": "done",
        "message": "12,000 tokens more",
        "details": {"tokens": 12_000},
    }
    evolution.journal.append("effect", asked[0].request_id, effect)
    opened = {"index": 1, "generation": 2, "environment_id": "e1" * 6, "changed": {}}
    evolution.journal.append("environment", "1", opened, {"because": [asked[0].request_id]})
    for key, perplexity in (("e1/g00-i00/0", 8.0), ("e1/g00-i00/repeat-1", 8.1)):
        evolution.repeat(key, perplexity, environment=1)
    for name, perplexity in (("g00-i00", 8.0), ("g01-i00", 7.0)):
        again = {
            "individual_id": name,
            "environment": 1,
            "genome_id": "ab",
            "status": "OK",
            "reason": "none",
            "message": "",
            "metrics": {"val_perplexity": perplexity, "val_bpb": perplexity / 5},
            "fitness": -perplexity,
        }
        evolution.journal.append("remeasured", f"e1/{name}", again, {"rates": {"mfu": 0.3}})
    evolution.individual("g02-i00", 6.5, environment=1)
    evolution.generation(2)
    return asked[0], asked[1]


def test_g6_what_people_said_and_what_came_of_it_stands_at_the_evolutions_run(
    evolution: Peopled,
) -> None:
    granted, _ = a_whole_run(evolution)
    evolution.end()
    evolution.deliver()
    tags = evolution.tags()
    counts = {name: tags[f"people.{name}"] for name in ("granted", "denied", "waiting")}
    # Of three requests and two reviews.
    assert counts == {"granted": "2", "denied": "2", "waiting": "1"}
    effect = tags[f"effect.{granted.request_id}"]
    assert effect == "done in generation 2: 12,000 tokens more"
    # MLflow keeps one of two points that fall into the same millisecond.
    assert set(evolution.history("people_asked")) == {(1, 5.0), (2, 5.0)}
    assert evolution.history("review_idle_seconds")[-1] == (2, 60.0)
    told = evolution.people()
    kinds = [one["kind"] if one["what"] == "entry" else one["what"] for one in told]
    answered = ["answered", "answered", "effect", "environment"]
    assert kinds == ["asked", "asked", "asked", "review", "review", *answered]
    assert [one["sequence"] for one in told if one["what"] == "entry"] == [1, 2, 3, 4, 5]
    assert {one["taken_at"] for one in told if one["what"] == "entry"} == {"g01", "g02"}
    assert told[5]["author"] == {"name": "ann", "door": "terminal"}
    assert told[5]["payload"]["content_hash"] == granted.content_hash


def test_a_withdrawal_takes_the_place_of_its_effect(evolution: Peopled) -> None:
    granted, _ = a_whole_run(evolution)
    gone = {
        "request_id": granted.request_id,
        "type": "dataset",
        "generation": 3,
        "message": "the text is mounted no longer",
        "carriers": [],
    }
    evolution.journal.append("withdrawn", granted.request_id, gone)
    evolution.deliver()
    words = evolution.tags()[f"effect.{granted.request_id}"]
    assert words == "withdrawn in generation 3: the text is mounted no longer"


def test_a_reviewed_rewrite_says_who_let_it_through_or_did_not(evolution: Peopled) -> None:
    a_whole_run(evolution)
    evolution.deliver()
    assert evolution.tags("g01-i00")["review"] == "approved by ann"
    denied = evolution.tags("g01-i01")["review"]
    assert denied.startswith("denied: ann did not approve it: zzz")
    assert 4_000 < len(denied) < 5_000
    assert "review" not in evolution.tags("g02-i00")


def test_the_review_of_a_champion_reaches_its_run_which_has_ended(evolution: Peopled) -> None:
    a_whole_run(evolution)
    silence = "nobody answered in time, which means no"
    evolution.review("champion/after-g02/g01-i00", "g01-i00", "expired", silence, "harness")
    evolution.deliver()
    assert evolution.tags("g01-i00")["review"] == f"expired: {silence}"


def test_a_later_environment_is_told_apart_from_the_first(evolution: Peopled) -> None:
    a_whole_run(evolution)
    evolution.deliver()
    tags = evolution.tags()
    assert (tags["environment_id"], tags["environments"]) == ("e1" * 6, "2")
    assert tags["darwin.environment_id"] == "e0" * 6
    assert evolution.history("base_repeat_val_perplexity") == [(1, 10.0)]
    again = evolution.history("base_repeat_environment_1_val_perplexity")
    assert again == [(1, 8.0), (2, 8.1)]
    assert evolution.tags("g02-i00")["environment_id"] == "e1" * 6
    assert "environment_id" not in evolution.tags("g01-i01")


def test_whoever_is_measured_again_shows_the_last_values_and_keeps_the_first(
    evolution: Peopled,
) -> None:
    a_whole_run(evolution)
    evolution.deliver()
    shown = evolution.run("g01-i00").data
    assert shown.tags["environment_id"] == "e1" * 6
    assert shown.metrics["val_perplexity"] == 7.0
    assert (shown.metrics["mfu"], shown.metrics["fitness"]) == (0.3, -7.0)
    assert evolution.history("val_perplexity", "g01-i00") == [(1, 9.0), (2, 7.0)]


def test_who_fails_in_the_new_environment_is_said_to(evolution: Peopled) -> None:
    a_whole_run(evolution)
    opened = {"index": 2, "generation": 3, "environment_id": "e2" * 6, "changed": {}}
    evolution.journal.append("environment", "2", opened)
    again = {
        "individual_id": "g01-i00",
        "environment": 2,
        "status": "TIMED_OUT",
        "message": "no checkpoint",
        "metrics": {},
        "fitness": None,
    }
    evolution.journal.append("remeasured", "e2/g01-i00", again)
    evolution.deliver()
    assert evolution.tags("g01-i00")["remeasured"] == "TIMED_OUT: no checkpoint"
    assert evolution.tags("g01-i00")["environment_id"] == "e2" * 6
    assert evolution.tags()["environments"] == "3"


def test_pictures_compare_within_the_last_environment_only(evolution: Peopled) -> None:
    a_whole_run(evolution)
    individuals, generations, bases = in_last_environment(evolution.events)
    values = {one["individual_id"]: one["metrics"].get("val_perplexity") for one in individuals}
    # g01-i01 failed before, and still counts among those that did.
    assert values == {"g00-i00": 8.0, "g01-i00": 7.0, "g01-i01": None, "g02-i00": 6.5}
    assert [one["metrics"]["val_perplexity"] for one in bases] == [8.0, 8.1]
    assert len(generations) == 2


def test_delivering_peoples_part_again_changes_nothing(evolution: Peopled) -> None:
    a_whole_run(evolution)
    evolution.end()
    evolution.deliver()
    before, points, told = evolution.run().data, n_points(evolution.store), evolution.people()
    (evolution.folder / "tracking.json").unlink()
    evolution.deliver()
    after = evolution.run().data
    assert (after.tags, after.metrics) == (before.tags, before.metrics)
    assert n_points(evolution.store) == points
    assert evolution.people() == told


def test_a_pause_is_told_in_seconds(evolution: Peopled) -> None:
    evolution.inbox.append("paused", {}, ANN)
    evolution.take("g01")
    evolution.journal.append("paused", "1", {}, {"seconds": 12.5})
    evolution.generation(1)
    evolution.deliver()
    assert evolution.history("paused_seconds") == [(1, 12.5)]
    assert [one["kind"] for one in evolution.people()] == ["paused"]


def test_a_run_that_no_person_took_part_in_shows_nothing_of_people(evolution: Peopled) -> None:
    evolution.take("g01")
    evolution.individual("g01-i00", 9.0)
    evolution.generation(1)
    evolution.take("closing")
    evolution.end()
    evolution.deliver()
    shown = evolution.run().data
    assert not [name for name in shown.tags if name.startswith(("people", "effect", "environment"))]
    assert not [name for name in shown.metrics if name.startswith(("people", "review", "paused"))]
    assert not (evolution.folder / "people.json").exists()
    assert not (evolution.folder / "people.json.new").exists()
