"""MLflow as a projection of the journal, written behind the evolution's back.

Reads: events of the journal, and the files that a run left in its folder.
Writes: an MLflow store, and `tracking.json` (how far delivery has come) in the run's folder.
Never: holds up or fails the evolution; what MLflow cannot take now waits, and what is still
waiting at the end is delivered when the journal is followed again. Nothing reads MLflow back
to decide anything, so a lost store costs nothing but a rebuild.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from darwin_exp.outbox import Outbox, StoreUnavailable
from darwin_exp.plots import generation_plots
from darwin_exp.protocols import Event

SECONDS_BETWEEN_PLOTS = 60.0
SQLITE = "sqlite:///"

ARTIFACTS = ("code", "change.patch", "memory.json", "evaluation.json", "train.log", "error.txt")
CLOSING_ARTIFACTS = ("summary.json", "report.html", "champion")
END_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "stopped": "KILLED"}
HEADLINE = ("val_perplexity", "mfu", "fitness")

NOTE = """**Evolution of training code.** Each nested run is one agent: the code it trained, the
change that made it, its log and what the trusted evaluator measured.

- `best_val_perplexity`, `mean_val_perplexity` by generation (step): lower is better.
- `best_mfu`, `mean_mfu`: share of the machine's peak that the training used, 0 to 1.
- `claim_*`: the closing comparison of the base with the selected agent, on fresh seeds.
- `plots/` shows every agent; nested runs carry `status`, `parent_ids` and `editor_id` as tags.
"""


class NullTracker:
    """Tracks nothing; what `tracking=none` builds."""

    run_id: str | None = None

    def follow(self, event: Event) -> None:
        """Take no note of an event."""

    def ready(self, seconds: float) -> bool:
        """Return True: there is nothing to wait for."""
        return True

    def close(self, seconds: float) -> int:
        """Return 0: nothing is outstanding."""
        return 0


class MlflowTracker(Outbox):
    """Delivers the journal's events to MLflow; see Outbox for what that promises."""

    def __init__(
        self,
        store_uri: str,
        artifact_folder: Path,
        experiment: str,
        run_folder: Path,
        parent_tags: Mapping[str, str] | None = None,
        cursor: Path | None = None,
        sweep_id: str | None = None,
    ) -> None:
        """Start delivering; mlflow is imported and the store opened at once, in the background.

        Args:
            store_uri: `sqlite:////absolute/path`, or whatever else MLflow takes.
            artifact_folder: where artifacts of a new experiment go (SQLite stores only).
            experiment: recipe name; the MLflow experiment is `darwin/<experiment>`.
            run_folder: `runs/RUN_ID`; its name is the run's id.
            parent_tags: further tags of the evolution's run.
            cursor: where delivery is recorded; `tracking.json` in the run folder if None.
            sweep_id: the sweep whose run becomes the parent of this evolution's run.
        """
        self._mirror = _Mirror(
            store_uri, artifact_folder, experiment, run_folder, dict(parent_tags or {}), sweep_id
        )
        super().__init__(self._mirror, cursor or run_folder / "tracking.json", store_uri)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the evolution's run; None until it has been created or found."""
        return self._mirror.runs.get("")


def initialise_store(store_uri: str) -> None:
    """Create a store's tables, alone; call it before anything else may open a fresh store.

    Raises:
        StoreUnavailable: the store cannot be written.
    """
    client_class = _quiet_client_class()
    with _alone(_sqlite_file(store_uri)):
        _probe(_sqlite_file(store_uri))
        client_class(store_uri)


class _Mirror:
    """One evolution as MLflow runs. Every method may be repeated without changing the outcome."""

    def __init__(
        self,
        store_uri: str,
        artifact_folder: Path,
        experiment: str,
        run_folder: Path,
        parent_tags: dict[str, str],
        sweep_id: str | None,
    ) -> None:
        self._uri = store_uri
        self._file = _sqlite_file(store_uri)
        self._artifact_folder = artifact_folder
        self._experiment_name = f"darwin/{experiment}"
        self._run_folder = run_folder
        self._run_id = run_folder.name
        self._parent_tags = parent_tags
        self._sweep_id = sweep_id
        self._client: Any = None
        self._inode = self._n_replaced = 0
        self._experiment_id = ""
        self._sweep_run: str | None = None
        self._plotted_at = time.monotonic()
        self.runs: dict[str, str] = {}  # MLflow's run ids by individual; "" is the evolution's
        self._kinds: dict[str, Callable[[Event, Sequence[Event]], None]] = {
            "run": self._on_run,
            "session": self._on_session,
            "individual": self._on_individual,
            "generation": self._on_generation,
            "job": self._on_job,
            "claim": self._on_claim,
            "end": self._on_end,
        }

    # --- the store --------------------------------------------------------------------------

    def holds_run(self) -> bool:
        """Return whether the store, when it was opened, had this evolution's run."""
        return "" in self.runs

    def is_open(self) -> bool:
        """Return whether the store was opened and is still the same file."""
        return self._client is not None and self._inode == self._inode_now()

    def open(self) -> None:
        """Open or create the store, alone; then find the runs that this evolution has in it.

        Raises:
            StoreUnavailable: the SQLite file cannot be written now.
        """
        client_class = _quiet_client_class()
        # MLflow builds its tables in many small steps and several processes doing so at once
        # leave a store that nobody can open again.
        with _alone(self._file):
            _probe(self._file)
            uri = self._uri
            if self._file is not None:
                replaced = self._inode not in (0, self._inode_now())
                self._n_replaced += replaced
                # MLflow keeps stores by their address, also one whose file has been replaced:
                # another spelling of the same path makes it look again.
                uri = f"{SQLITE}{self._file.parent}{'/.' * self._n_replaced}/{self._file.name}"
            client = client_class(uri)
            self._experiment_id = self._find_experiment(client)
            self._inode = self._inode_now()
            self._client = client
            if self._sweep_id is not None:
                self._sweep_run = self._find_sweep(self._sweep_id)
            self.runs = {
                run.data.tags.get("individual_id", ""): run.info.run_id
                for run in self._search(f"tags.`darwin.run_id` = '{self._run_id}'")
            }

    def forget(self) -> None:
        """Make the next delivery open the store anew."""
        self._client = None

    def surely_works(self) -> bool:
        """Return whether the store is known to take writes, so that a failure is the event's."""
        try:
            _probe(self._file)
        except StoreUnavailable:
            return False
        return self._file is not None

    def _inode_now(self) -> int:
        if self._file is None:
            return 1
        try:
            return self._file.stat().st_ino
        except OSError:
            return -1

    def _find_experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        location = None
        if self._file is not None:
            folder = self._artifact_folder.absolute() / self._experiment_name
            location = folder.as_uri()
        # Without a kind the UI shows an experiment's runs among those of language-model apps.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(self._experiment_name, location, tags))

    def _find_sweep(self, sweep_id: str) -> str:
        role = f"tags.`darwin.sweep_id` = '{sweep_id}' and tags.`darwin.role` = 'sweep'"
        for run in self._search(role):
            return str(run.info.run_id)
        tags = {"darwin.sweep_id": sweep_id, "darwin.role": "sweep"}
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=sweep_id)
        return str(run.info.run_id)

    def _search(self, condition: str) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id], condition, max_results=500, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    # --- events -----------------------------------------------------------------------------

    def deliver(self, event: Event, history: Sequence[Event], stop: Callable[[], bool]) -> None:
        """Write one event; kinds that mean nothing to MLflow are passed over.

        Raises:
            StoreUnavailable: the SQLite file cannot be written now.
            InterruptedError: `stop` said so before anything was written.
        """
        handler = self._kinds.get(event.kind)
        if handler is None:
            return
        _probe(self._file)
        if stop():
            raise InterruptedError("tracking was closed")
        handler(event, history)

    def _on_run(self, event: Event, history: Sequence[Event]) -> None:
        payload = event.payload
        tags = {
            "darwin.run_id": self._run_id,
            "darwin.role": "evolution",
            "darwin.environment_id": payload.get("environment_id"),
            "darwin.base_genome_id": payload.get("base_genome_id"),
            "darwin.command": event.measured.get("command"),
            "darwin.host": event.measured.get("host"),
            "mlflow.note.content": NOTE,
            "mlflow.source.name": "darwin_exp",
            "mlflow.source.type": "LOCAL",
            **self._parent_tags,
        }
        if self._sweep_run is not None:
            tags |= {"darwin.sweep_id": self._sweep_id, "mlflow.parentRunId": self._sweep_run}
        run = self._run_for("", self._run_id, _milliseconds(event))
        params = _flat(payload.get("config", {}))
        params |= _flat(payload.get("environment", {}), "environment.")
        self._log(run, params=params, tags=tags)

    def _on_session(self, event: Event, history: Sequence[Event]) -> None:
        if event.payload.get("what") == "resumed":
            self._client.update_run(self._parent(), status="RUNNING")

    def _on_individual(self, event: Event, history: Sequence[Event]) -> None:
        payload, measured = event.payload, event.measured
        individual_id = str(payload.get("individual_id", event.key))
        summary = str(payload.get("summary") or "base")
        seconds = {
            name: _number(measured.get(name)) or 0.0
            for name in (
                "startup_seconds",
                "training_seconds",
                "scoring_seconds",
                "overhead_seconds",
            )
        }
        end = _milliseconds(event)
        start = max(0, end - int(1000 * sum(seconds.values())))
        parent = self._parent()
        run = self._run_for(individual_id, f"{individual_id} {summary[:60]}", start)
        status, reason = str(payload.get("status")), payload.get("reason")
        edits = list(payload.get("edits", ()))
        n_new = int(payload.get("n_new_edits", 0))
        tags = {
            "mlflow.parentRunId": parent,
            "mlflow.source.name": "darwin_exp",
            "mlflow.source.type": "LOCAL",
            "mlflow.note.content": _note_of_individual(payload, edits),
            "individual_id": individual_id,
            "generation": payload.get("generation"),
            "slot": payload.get("slot"),
            "parent_ids": ",".join(payload.get("parent_ids", ())),
            "editor_id": payload.get("editor_id"),
            "status": status,
            "reason": None if reason == "none" else reason,
            "message": payload.get("message") or None,
            "repaired": payload.get("repaired"),
            "contended": measured.get("contended"),
        }
        new_edits = edits[len(edits) - n_new :]
        params = {
            "summary": summary,
            "operators": ", ".join(str(edit.get("operator")) for edit in edits),
            "new_operators": ", ".join(str(edit.get("operator")) for edit in new_edits),
            "expected_effect": payload.get("expected_effect") or None,
        }
        metrics = {
            **dict(payload.get("metrics", {})),
            **dict(measured.get("rates", {})),
            **seconds,
            "fitness": payload.get("fitness", measured.get("fitness")),
            "attempts": payload.get("attempts"),
        }
        step = int(payload.get("generation", 0))
        self._log(run, metrics=metrics, params=params, tags=tags, timestamp=end, step=step)
        self._upload(run, self._run_folder / "individuals" / individual_id, ARTIFACTS)
        self._client.set_terminated(run, "FINISHED" if status == "OK" else "FAILED", end)

    def _on_generation(self, event: Event, history: Sequence[Event]) -> None:
        metrics = {
            f"{which}_{name}": {
                **dict(event.payload.get(which) or {}),
                **dict(event.measured.get(which) or {}),
            }.get(name)
            for which in ("best", "mean")
            for name in HEADLINE
        }
        metrics["generation_seconds"] = event.measured.get("seconds")
        step = int(event.payload.get("generation", event.key))
        tags = {"best_id": event.payload.get("best_id")}
        self._log(
            self._parent(), metrics=metrics, tags=tags, timestamp=_milliseconds(event), step=step
        )
        if time.monotonic() - self._plotted_at > SECONDS_BETWEEN_PLOTS:
            self._plot(history)

    def _on_job(self, event: Event, history: Sequence[Event]) -> None:
        purpose = event.payload.get("purpose")
        if purpose in (None, "search"):
            return
        name, n_steps = str(purpose), event.payload.get("max_steps")
        if purpose != "base_repeat":
            name += f"_{event.payload.get('individual_id')}"
            name += "" if n_steps is None else f"_{n_steps}_steps"

        def same_series(other: Event) -> bool:
            keys = ("purpose", "individual_id", "max_steps")
            return (
                other.kind == "job"
                and bool(other.payload.get("metrics"))
                and all(other.payload.get(key) == event.payload.get(key) for key in keys)
            )

        step = sum(same_series(e) for e in history if e.sequence <= event.sequence)
        found = {
            **dict(event.payload.get("metrics") or {}),
            **dict(event.measured.get("rates") or {}),
        }
        metrics = {f"{name}_{k}": v for k, v in found.items() if "perplexity" in k or k == "mfu"}
        self._log(self._parent(), metrics=metrics, timestamp=_milliseconds(event), step=step)

    def _on_claim(self, event: Event, history: Sequence[Event]) -> None:
        flat = _flat({**event.payload, **event.measured}, "claim_", separator="_")
        numbers = {key: value for key, value in flat.items() if _number(value) is not None}
        words = {key: value for key, value in flat.items() if key not in numbers}
        self._log(self._parent(), metrics=numbers, tags=words, timestamp=_milliseconds(event))

    def _on_end(self, event: Event, history: Sequence[Event]) -> None:
        parent, end = self._parent(), _milliseconds(event)
        status = str(event.payload.get("status"))
        tags = {"darwin.status": status, "darwin.exit_code": event.payload.get("exit_code")}
        metrics = {"total_seconds": event.measured.get("seconds")}
        self._log(parent, metrics=metrics, tags=tags, timestamp=end)
        self._plot(history)
        self._upload(parent, self._run_folder, CLOSING_ARTIFACTS)
        self._client.set_terminated(parent, END_STATUS.get(status, "FAILED"), end)
        if self._sweep_run is not None:
            self._client.set_terminated(self._sweep_run, "FINISHED", end)

    # --- writing ----------------------------------------------------------------------------

    def _parent(self) -> str:
        try:
            return self.runs[""]
        except KeyError:
            raise LookupError("no event of kind 'run' was followed before this one") from None

    def _run_for(self, individual_id: str, name: str, start: int) -> str:
        """Return the run with these identifying tags, created if there is none."""
        if individual_id not in self.runs:
            tags = {"darwin.run_id": self._run_id}
            if individual_id:
                tags |= {"individual_id": individual_id, "mlflow.parentRunId": self._parent()}
            run = self._client.create_run(
                self._experiment_id, start_time=start, tags=tags, run_name=_text(name, 250)
            )
            self.runs[individual_id] = str(run.info.run_id)
        return self.runs[individual_id]

    def _log(
        self,
        run: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        timestamp: int = 0,
        step: int = 0,
    ) -> None:
        """Log what is known, that is everything but None; numbers that are not finite count so."""
        from mlflow.entities import Metric, Param, RunTag

        numbers = {key: _number(value) for key, value in (metrics or {}).items()}
        all_metrics = [
            Metric(_key(key), value, timestamp, step)
            for key, value in numbers.items()
            if value is not None
        ]
        all_params = [Param(_key(k), _text(v, 5900)) for k, v in _known(params)]
        all_tags = [RunTag(_key(k), _text(v, 4900)) for k, v in _known(tags)]
        size = 90  # MLflow takes 100 parameters and tags, and 1000 metrics, at a time
        for at in range(0, max(len(all_params), len(all_tags), len(all_metrics)), size):
            self._client.log_batch(
                run,
                metrics=all_metrics[at : at + size],
                params=all_params[at : at + size],
                tags=all_tags[at : at + size],
            )

    def _upload(self, run: str, folder: Path, names: Sequence[str]) -> None:
        for name in names:
            path = folder / name
            if path.is_symlink():
                continue
            if path.is_dir():
                self._client.log_artifacts(run, str(path), name)
            elif path.is_file():
                self._client.log_artifact(run, str(path))

    def _plot(self, history: Sequence[Event]) -> None:
        def of_kind(kind: str) -> list[dict[str, Any]]:
            return [{**e.measured, **e.payload} for e in history if e.kind == kind]

        repeats = [job for job in of_kind("job") if job.get("purpose") == "base_repeat"]
        folder = self._run_folder / "plots"
        generation_plots(folder, of_kind("individual"), of_kind("generation"), repeats)
        self._upload(self._parent(), self._run_folder, ("plots",))
        self._plotted_at = time.monotonic()


def _note_of_individual(payload: Mapping[str, Any], edits: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"- `{edit.get('operator')}` in `{edit.get('file')}`: {edit.get('why')}" for edit in edits
    ]
    if payload.get("message"):
        lines += ["", f"**{payload.get('status')}** {payload.get('message')}"]
    return "\n".join(lines)


def _sqlite_file(store_uri: str) -> Path | None:
    return Path(store_uri[len(SQLITE) :]) if store_uri.startswith(SQLITE) else None


def _probe(store: Path | None) -> None:
    """Make sure that a SQLite store takes writes now; nothing is asked of other stores.

    MLflow itself would retry a file that it cannot open for minutes, and loudly.

    Raises:
        StoreUnavailable: it is locked, read-only, or cannot be made.
    """
    if store is None:
        return
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(store, timeout=1.0)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except (OSError, sqlite3.Error) as error:
        raise StoreUnavailable(f"{store}: {error}") from error


@contextlib.contextmanager
def _alone(store: Path | None) -> Iterator[None]:
    """Hold the lock file beside a SQLite store; other kinds of store need none.

    Raises:
        StoreUnavailable: the lock file cannot be made.
    """
    if store is None:
        yield
        return
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        lock = store.with_name(store.name + ".lock").open("w")
    except OSError as error:
        raise StoreUnavailable(f"{store}: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _quiet_client_class() -> Any:
    """Import mlflow without telemetry, hints and chatter, and return its client class."""
    if "mlflow" not in sys.modules:
        for name in (
            "MLFLOW_DISABLE_TELEMETRY",
            "MLFLOW_DISABLE_AGENT_HINT",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
        ):
            os.environ.setdefault(name, "true")
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return MlflowClient


def _milliseconds(event: Event) -> int:
    return int(1000 * event.written_at)


def _flat(tree: Mapping[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Return the leaves of a nested mapping by dotted path; an interval becomes _low and _high."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{key}{separator}", separator)
        elif key == "ci95" and isinstance(value, list | tuple) and len(value) == 2:
            leaves |= {f"{prefix}{key}_low": value[0], f"{prefix}{key}_high": value[1]}
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _number(value: Any) -> float | None:
    """Return a finite number, or None for everything else; a truth value is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _known(values: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in (values or {}).items() if value not in (None, "")]


def _key(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_\-. /]", "_", name)[:250]


def _text(value: Any, limit: int) -> str:
    """Return a value as text that every store can hold, cut to a number of characters."""
    text = value if isinstance(value, str) else _spelled(value)
    text = text.encode("utf-8", "replace").decode("utf-8").replace("\0", "�")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _spelled(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | tuple | Mapping) else str(value)
