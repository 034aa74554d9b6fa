"""Calls of language models as MLflow traces: each once, whole, and tied to its agent."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.journal import Journal, load
from darwin_exp.protocols import Event
from darwin_exp.tracking import MlflowTracker, initialise_store
from darwin_exp.tracking.traces import KINDS, Trace, _span, traces_of

# MLflow's own use of SQLAlchemy is what warns here, not this project.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

MODEL = {
    "name": "gpt-4o-mini",
    "base_url": "https://api.example.test/v1",
    "temperature": 0.7,
    "key_env": "OPENAI_API_KEY",
}
LOCAL = {**MODEL, "name": "qwen-coder", "base_url": "http://127.0.0.1:9/v1", "temperature": None}
ANSWER = json.dumps({"reasoning": "wörds – \u202e \x00", "summary": "s", "edits": []})
LONG = "def train() -> None: ...  # ünïcode\n" * 3000  # about 110 kB


class Asking:
    """A small evolution with language models, written into a real journal as a run would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "runs" / "260102-0304-llm"
        self.folder.mkdir(parents=True)
        self.store = folder / "store" / "mlflow.db"
        self.journal = Journal(self.folder)
        self.journal.append("session", "0", {"what": "started"}, {"pid": 1})
        config = {"mutator.name": "openai", "llm.prices.gpt-4o-mini": [0.15, 0.6]}
        self.journal.append("run", "run", {"config": config}, {"run_id": self.folder.name})
        self.individual("g00-i00", None)

    @property
    def events(self) -> list[Event]:
        return self.journal.events()

    def answer(
        self,
        query: str,
        messages: list[list[str]],
        text: str = ANSWER,
        model: dict[str, Any] = MODEL,
        usd: float | None = 0.00021,
        seconds: float = 1.25,
        tries: int = 1,
        finish: str = "complete",
    ) -> None:
        self.reserve(f"{query}.{tries - 1}", model)
        payload = {
            "individual_id": query.split("/")[0],
            "purpose": "draft" if query.split("/")[1] == "0" else "repair",
            "model": model,
            "response_format": "json_schema",
            "schema": "edits",
            "messages": messages,
            "prompt_sha256": "ab" * 32,
            "max_tokens": 800,
            "text": text,
            "finish": finish,
            "tokens_in": 1000,
            "tokens_out": 100,
            "usd": usd,
        }
        self.journal.append("llm_answered", query, payload, {"seconds": seconds, "tries": tries})

    def reserve(self, key: str, model: dict[str, Any] = MODEL) -> None:
        payload = {
            "individual_id": key.split("/")[0],
            "model": model,
            "prompt_sha256": "ab" * 32,
            "tokens": 1800,
            "usd": 0.001,
        }
        self.journal.append("llm_reserved", key, payload)

    def fail(self, key: str, kind: str, status: int | None, **more: Any) -> None:
        self.reserve(key)
        payload = {"status": status, "kind": kind, "message": f"the endpoint said {kind}", **more}
        self.journal.append("llm_failed", key, payload, {"seconds": 0.5})

    def individual(self, name: str, editor: str | None, model: dict[str, Any] = MODEL) -> None:
        edit = {"operator": "gpt-4o-mini", "file": "train.py", "why": "w", "parameters": {}}
        payload = {
            "individual_id": name,
            "generation": int(name[1:3]),
            "slot": int(name[-2:]),
            "parent_ids": ["g00-i00"] if editor else [],
            "editor_id": editor,
            "edits": [edit] if editor else [],
            "n_new_edits": 1 if editor else 0,
            "summary": "a rewrite" if editor else "the base",
            "status": "OK",
            "reason": "none",
            "message": "",
            "metrics": {"val_perplexity": 9.0},
            "fitness": -2.2,
            "attempts": 1,
            "repaired": False,
            "model": model if editor else None,
        }
        self.journal.append("individual", name, payload, {"rates": {}, "training_seconds": 2.0})

    def generation(self, number: int) -> None:
        payload = {"generation": number, "best_id": "g00-i00", "best": {"val_perplexity": 9.0}}
        self.journal.append("generation", str(number), payload, {"seconds": 3.0})

    def live(self) -> None:
        """Write two generations: a draft turned down, a retry, a repair, an unpriced model."""
        prompt = [["system", "You edit."], ["user", LONG]]
        self.answer("g00-i01/0/0", prompt)
        again = [*prompt, ["assistant", ANSWER], ["user", "train.py does not parse"]]
        self.answer("g00-i01/0/1", again, text="second")
        self.individual("g00-i01", "g00-i00")
        self.generation(0)
        self.fail("g01-i00/0/0.0", "rate_limited", 429)
        self.fail("g01-i00/0/0.1", "timeout", None, unknown=True)
        self.answer("g01-i00/0/0", prompt, tries=3, seconds=4.0)
        self.answer("g01-i00/1/0", prompt, text="mended", finish="length")
        self.individual("g01-i00", "g00-i01")
        self.answer("g01-i01/0/0", prompt, model=LOCAL, usd=None)
        self.individual("g01-i01", "g00-i00", LOCAL)
        self.generation(1)

    def tracker(self) -> MlflowTracker:
        return MlflowTracker(
            f"sqlite:///{self.store}", self.store.parent / "artifacts", "llm", self.folder
        )

    def deliver(self, events: list[Event] | None = None) -> int:
        tracker = self.tracker()
        for event in self.events if events is None else events:
            tracker.follow(event)
        remaining = tracker.close(60)
        print("last error:", tracker.last_error)  # which pytest shows where a test fails
        return remaining


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised store, made once: building the tables is most of a test's time."""
    folder = tmp_path_factory.mktemp("empty")
    initialise_store(f"sqlite:///{folder / 'mlflow.db'}")
    return folder / "mlflow.db"


@pytest.fixture
def run(tmp_path: Path, empty_store: Path) -> Iterator[Asking]:
    asking = Asking(tmp_path)
    asking.store.parent.mkdir()
    shutil.copy(empty_store, asking.store)
    yield asking
    asking.journal.close()


def client_of(run: Asking) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{run.store}")


def runs_of(run: Asking) -> dict[str, Any]:
    client = client_of(run)
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(experiments, max_results=1000)
    return {one.data.tags.get("individual_id", ""): one for one in found}


def traces_in(run: Asking, individual_id: str | None = None) -> dict[str, Any]:
    """Return what MLflow holds by query; of one individual as its run's Traces tab asks for it."""
    client = client_of(run)
    experiments = [one.experiment_id for one in client.search_experiments()]
    tied = {} if individual_id is None else {"run_id": runs_of(run)[individual_id].info.run_id}
    found = client.search_traces(locations=experiments, max_results=500, **tied)
    named = {(one.info.tags["query"], one.info.tags["finish"]): one for one in found}
    assert len(named) == len(found), "a call has two traces"
    return {f"{query} {finish}": trace for (query, finish), trace in named.items()}


def made(run: Asking, individual_id: str) -> list[Trace]:
    """Return the traces that are made of an individual's calls, before any store."""
    own = next(e for e in run.events if e.kind == "individual" and e.key == individual_id)
    return traces_of(own, run.events, run.folder.name)


def test_every_call_is_a_trace_of_its_individuals_run(run: Asking) -> None:
    run.live()
    assert run.deliver() == 0
    assert set(traces_in(run, "g00-i01")) == {"g00-i01/0/0 complete", "g00-i01/0/1 complete"}
    assert set(traces_in(run, "g01-i00")) == {
        "g01-i00/0/0 rate_limited",
        "g01-i00/0/0 timeout",
        "g01-i00/0/0 complete",
        "g01-i00/1/0 length",
    }
    assert set(traces_in(run, "g01-i01")) == {"g01-i01/0/0 complete"}
    assert traces_in(run, "g00-i00") == {}
    assert len(traces_in(run)) == 7


def test_a_trace_holds_the_whole_exchange_its_times_and_its_cost(run: Asking) -> None:
    run.live()
    assert run.deliver() == 0
    trace = traces_in(run, "g00-i01")["g00-i01/0/0 complete"]
    event = next(e for e in run.events if e.kind == "llm_answered" and e.key == "g00-i01/0/0")
    (span,) = trace.data.spans
    assert [one["content"] for one in span.inputs["messages"]] == ["You edit.", LONG]
    assert [one["role"] for one in span.inputs["messages"]] == ["system", "user"]
    assert span.inputs["temperature"] == 0.7
    assert span.outputs["choices"][0]["message"]["content"] == ANSWER, "though it is JSON itself"
    assert span.span_type == "CHAT_MODEL"
    assert abs(span.end_time_ns / 1e9 - event.written_at) < 0.001
    assert abs((span.end_time_ns - span.start_time_ns) / 1e9 - 1.25) < 0.001
    assert abs(trace.info.request_time / 1000 - (event.written_at - 1.25)) < 0.01
    assert abs(trace.info.execution_duration - 1250) <= 1
    assert trace.info.state.value == "OK"
    usage = {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100}
    assert span.get_attribute("mlflow.chat.tokenUsage") == usage
    assert trace.info.token_usage == usage
    assert span.model_name == "gpt-4o-mini"
    assert span.llm_cost["total_cost"] == pytest.approx(0.00021)
    assert span.llm_cost["input_cost"] == pytest.approx(0.00015), "by the price list of the run"
    assert json.loads(trace.info.trace_metadata["mlflow.trace.cost"]) == span.llm_cost
    tags = trace.info.tags
    assert tags["individual_id"] == "g00-i01"
    assert tags["generation"] == "0"
    assert tags["editor_id"] == "g00-i00"
    assert tags["model"] == "gpt-4o-mini"
    assert tags["model_endpoint"] == "https://api.example.test/v1"
    assert tags["purpose"] == "draft"
    assert tags["query"] == "g00-i01/0/0"
    assert tags["usd"] == "0.00021"
    assert tags["latency_seconds"] == "1.250"
    assert tags["mlflow.traceName"] == "draft g00-i01"


def test_the_calls_of_an_individual_are_one_session(run: Asking) -> None:
    run.live()
    assert run.deliver() == 0
    sessions = {
        trace.info.tags["individual_id"]: trace.info.trace_metadata["mlflow.trace.session"]
        for trace in traces_in(run).values()
    }
    assert len(set(sessions.values())) == 3
    own = {
        trace.info.trace_metadata["mlflow.trace.session"]
        for trace in traces_in(run, "g01-i00").values()
    }
    assert own == {f"{run.folder.name}/g01-i00"}, "which no other run's agent of that name shares"


def test_f1_f3_a_failed_try_is_a_trace_with_its_error(run: Asking) -> None:
    run.live()
    assert run.deliver() == 0
    found = traces_in(run, "g01-i00")
    limited, lost = found["g01-i00/0/0 rate_limited"], found["g01-i00/0/0 timeout"]
    for trace in (limited, lost):
        assert trace.info.state.value == "ERROR"
        assert trace.data.spans[0].outputs is None
        assert trace.info.token_usage is None
        assert trace.data.spans[0].inputs["messages"][1]["content"] == LONG, "of the later answer"
    assert limited.info.tags["http_status"] == "429"
    assert "the endpoint said rate_limited" in limited.data.spans[0].status.description
    (event,) = limited.data.spans[0].events  # which a page shows, unlike that description
    assert event.name == "exception"
    assert event.attributes["exception.type"] == "rate limited"
    assert "the endpoint said rate_limited" in event.attributes["exception.message"]
    assert lost.info.tags["outcome"] == "unknown: counted as spent"


def test_a_failure_that_was_never_answered_is_traced_by_its_reservation(run: Asking) -> None:
    run.fail("g00-i01/0/0.0", "server", 503)
    run.individual("g00-i01", "g00-i00")
    (trace,) = made(run, "g00-i01")
    assert trace.model == "gpt-4o-mini"
    assert trace.inputs["prompt_sha256"] == "ab" * 32
    assert "messages" not in trace.inputs
    assert trace.tags["purpose"] == "draft"


def test_a_price_that_is_not_known_is_not_invented(
    run: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.entities import Span
    from mlflow.tracing.otel.translation import translate_span_when_storing

    asked: list[str] = []

    def cost_per_token(model: str, **_: Any) -> tuple[float, float]:
        asked.append(model)
        return 1.0, 1.0

    monkeypatch.setattr("mlflow.utils.providers.cost_per_token", cost_per_token)
    run.live()
    assert run.deliver() == 0
    assert asked == [], "MLflow would fetch its price list from the network"
    (trace,) = traces_in(run, "g01-i01").values()
    assert "mlflow.trace.cost" not in trace.info.trace_metadata
    assert "usd" not in trace.info.tags
    assert trace.info.token_usage["total_tokens"] == 1100
    # The control: a span that says nothing of a price is given one.
    written = _span(made(run, "g01-i01")[0]).to_dict()
    del written["attributes"]["mlflow.llm.cost"]
    translate_span_when_storing(Span.from_dict(written))
    assert "qwen-coder" in asked


def test_a_price_that_the_runs_list_does_not_explain_is_not_split(run: Asking) -> None:
    run.answer("g00-i01/0/0", [["user", "u"]], usd=0.5)
    run.individual("g00-i01", "g00-i00")
    (trace,) = made(run, "g00-i01")
    assert trace.usd == {"total_cost": 0.5}


def test_delivering_everything_again_changes_no_trace(run: Asking) -> None:
    run.live()
    assert run.deliver() == 0
    before = {key: trace.info.to_dict() for key, trace in traces_in(run).items()}
    (run.folder / "tracking.json").unlink()
    assert run.deliver() == 0
    assert {key: trace.info.to_dict() for key, trace in traces_in(run).items()} == before


def test_a_trace_that_was_cut_off_while_it_was_written_is_finished(
    run: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracing.client import TracingClient

    run.live()
    write = TracingClient.log_spans
    failures = iter([OSError("cut off")])

    def cut_off_once(self: Any, *arguments: Any) -> Any:
        for failure in failures:
            raise failure
        return write(self, *arguments)

    monkeypatch.setattr(TracingClient, "log_spans", cut_off_once)
    assert run.deliver() == 0
    found = traces_in(run)
    assert len(found) == 7
    assert all(len(trace.data.spans) == 1 for trace in found.values())
    trace = traces_in(run, "g00-i01")["g00-i01/0/0 complete"]
    assert trace.info.tags["query"] == "g00-i01/0/0"
    assert trace.info.token_usage["total_tokens"] == 1100


def test_traces_follow_their_individual_when_its_run_was_deleted_and_made_again(
    run: Asking,
) -> None:
    run.live()
    assert run.deliver() == 0
    old = runs_of(run)
    for one in old.values():
        client_of(run).delete_run(one.info.run_id)
    (run.folder / "tracking.json").unlink()
    assert run.deliver() == 0
    new = runs_of(run)
    assert new["g01-i00"].info.run_id != old["g01-i00"].info.run_id
    assert len(traces_in(run, "g01-i00")) == 4
    assert len(traces_in(run)) == 7


def test_a_server_that_keeps_no_spans_still_gets_every_run(
    run: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracing.client import TracingClient

    def refuse(*_: Any) -> Any:
        raise NotImplementedError("server version 3.3")

    monkeypatch.setattr(TracingClient, "log_spans", refuse)
    run.live()
    assert run.deliver() == 0
    assert set(runs_of(run)) == {"", "g00-i00", "g00-i01", "g01-i00", "g01-i01"}


def test_a_run_without_models_makes_no_trace_and_no_figure_of_them(
    run: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracing.client import TracingClient

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("MLflow was asked about traces")

    run.live()
    bare = [
        replace(event, payload={**event.payload, "model": None})
        for event in run.events
        if event.kind not in KINDS
    ]
    for method in ("start_trace", "log_spans", "search_traces"):
        monkeypatch.setattr(TracingClient, method, refuse)
    assert run.deliver(bare) == 0
    runs = runs_of(run)
    assert not [name for name in runs[""].data.metrics if name.startswith("llm_")]
    assert "model" not in runs["g01-i00"].data.params


def test_spending_is_told_by_generation_and_rates_at_the_end(run: Asking) -> None:
    run.live()
    rates = {"error_rate": 0.25, "resolution_rate": 0.5, "improvement": {"equal_steps": None}}
    (run.folder / "summary.json").write_text(json.dumps(rates))
    assert run.deliver() == 0
    run.journal.append("end", "0", {"status": "stopped", "exit_code": 4}, {"seconds": 9.0})
    assert run.deliver() == 0
    runs = runs_of(run)
    parent = runs[""]

    def curve(metric: str) -> set[tuple[int, float]]:
        points = client_of(run).get_metric_history(parent.info.run_id, metric)
        return {(point.step, point.value) for point in points}

    assert curve("llm_calls") == {(0, 2.0), (1, 5.0)}
    assert curve("llm_tokens_in") == {(0, 2000.0), (1, 5000.0)}
    assert curve("llm_tokens_out") == {(0, 200.0), (1, 500.0)}
    assert curve("llm_usd") == {(0, 0.00042)}, "later an answer's price is not known"
    assert parent.data.metrics["error_rate"] == 0.25
    assert parent.data.metrics["resolution_rate"] == 0.5
    assert runs["g01-i00"].data.params["model"] == "gpt-4o-mini@0.7"
    assert runs["g01-i00"].data.tags["model_endpoint"] == "https://api.example.test/v1"
    assert runs["g01-i01"].data.params["model"] == "qwen-coder"
    assert runs["g01-i00"].data.params["new_operators"] == "gpt-4o-mini"
    assert "model" not in runs["g00-i00"].data.params


def test_what_was_spent_after_the_last_generation_is_told_at_the_end(run: Asking) -> None:
    run.live()
    run.answer("g02-i00/0/0", [["user", "u"]])
    run.journal.append("end", "0", {"status": "stopped", "exit_code": 4}, {"seconds": 9.0})
    assert run.deliver() == 0
    assert runs_of(run)[""].data.metrics["llm_calls"] == 6


def test_half_characters_of_a_model_do_not_stop_a_trace(run: Asking) -> None:
    run.answer("g00-i01/0/0", [["user", "u"]])
    run.individual("g00-i01", "g00-i00")
    odd = [
        replace(event, payload={**event.payload, "text": "half \ud83d\x00 of one"})
        if event.kind == "llm_answered"
        else event
        for event in run.events
    ]
    assert run.deliver(odd) == 0
    (trace,) = traces_in(run, "g00-i01").values()
    assert "of one" in trace.data.spans[0].outputs["choices"][0]["message"]["content"]


def test_delivery_leaves_no_thread_and_no_tracer_behind(run: Asking) -> None:
    from mlflow.tracing.provider import provider as tracing

    run.live()
    before = {thread.ident for thread in threading.enumerate()}
    tracer = tracing.get()
    assert run.deliver() == 0
    left = [one.name for one in threading.enumerate() if one.ident not in before]
    assert left == []
    assert tracing.get() is tracer, "MLflow's own tracer was set up"


DELIVER = """
import sys, threading
from pathlib import Path
from darwin_exp.journal import load
from darwin_exp.tracking import MlflowTracker
store, folder = sys.argv[1:]
tracker = MlflowTracker(f"sqlite:///{store}", Path(store).parent / "a", "llm", Path(folder))
for event in load(Path(folder)):
    tracker.follow(event)
print(tracker.close(120), [one.name for one in threading.enumerate()])
"""


def test_mlflow_asks_nobody_and_says_nothing_about_traces(run: Asking) -> None:
    run.live()
    run.journal.close()
    assert load(run.folder)
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(0.01)
        proxy = f"http://127.0.0.1:{trap.getsockname()[1]}"
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        done = subprocess.run(
            [sys.executable, "-c", DELIVER, str(run.store), str(run.folder)],
            env={"PATH": "/usr/bin:/bin", **dict.fromkeys(names, proxy)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        with pytest.raises(TimeoutError):
            trap.accept()
    assert (done.stdout, done.stderr) == ("0 ['MainThread']\n", "")
