"""The MLflow store and one evolution's runs in it; mlflow is first imported here, and kept quiet.

Reads: the store, to find what an earlier session left there; files to be uploaded.
Writes: the store and, beside a SQLite file, its lock file.
Never: waits for a store that takes no writes now, or lets MLflow speak to the terminal.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darwin_exp.tracking.outbox import StoreUnavailable
from darwin_exp.tracking.traces import Trace, storable, write_traces

SQLITE = "sqlite:///"


def initialise_store(store_uri: str) -> None:
    """Create a store's tables, alone; call it before anything else may open a fresh store.

    Raises:
        StoreUnavailable: the store cannot be written.
    """
    writable_client(store_uri)


@dataclass(frozen=True)
class SweepParent:
    """The run under which a sweep's evolutions stand.

    Attributes:
        tags: further tags of it; None where this process does not work at the sweep, and so has
            no say in how it stands.
    """

    sweep_id: str
    tags: Mapping[str, str] | None = None

    @property
    def condition(self) -> str:
        """Return the search condition that finds it."""
        return f"tags.`darwin.sweep_id` = '{self.sweep_id}' and tags.`darwin.role` = 'sweep'"


class EvolutionRuns:
    """One evolution's MLflow runs. Writing the same again changes nothing.

    Attributes:
        known: MLflow's run ids by individual; "" is the evolution's own.
        sweep: the sweep that the evolution belongs to, or None.
        sweep_run: MLflow's id of the sweep's run; None without a sweep.
    """

    def __init__(
        self,
        store_uri: str,
        artifact_folder: Path,
        experiment: str,
        run_id: str,
        sweep: SweepParent | None,
    ) -> None:
        """Note where everything is; nothing is opened before `open`."""
        self._uri = store_uri
        self._file = _sqlite_file(store_uri)
        self._artifact_folder = artifact_folder
        self._experiment_name = f"darwin/{experiment}"
        self._run_id = run_id
        self.sweep = sweep
        self._client: Any = None
        self._inode = self._n_replaced = 0
        self._experiment_id = ""
        self.sweep_run: str | None = None
        self.known: dict[str, str] = {}

    # --- opening ----------------------------------------------------------------------------

    def holds_run(self) -> bool:
        """Return whether the store, when it was opened, had this evolution's run."""
        return "" in self.known

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
            self.probe()
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
            if self.sweep is not None:
                self.sweep_run = self._find_sweep(self.sweep)
            self.known = {
                run.data.tags.get("individual_id", ""): run.info.run_id
                for run in self._search(f"tags.`darwin.run_id` = '{self._run_id}'")
            }

    def forget(self) -> None:
        """Make the next delivery open the store anew."""
        self._client = None

    def probe(self) -> None:
        """Make sure that the store takes writes now, as far as that can be asked of it.

        Raises:
            StoreUnavailable: the SQLite file cannot be written now.
        """
        _probe(self._file)

    def surely_works(self) -> bool:
        """Return whether the store is known to take writes, so that a failure is the event's."""
        try:
            self.probe()
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

    def _find_sweep(self, sweep: SweepParent) -> str:
        for run in self._search(sweep.condition):
            if sweep.tags is not None and run.info.status != "RUNNING":
                self._client.update_run(run.info.run_id, status="RUNNING")
            return str(run.info.run_id)
        tags = {**(sweep.tags or {}), "darwin.sweep_id": sweep.sweep_id, "darwin.role": "sweep"}
        name = tags.pop("mlflow.runName", sweep.sweep_id)
        tags = {tidy(key): _text(value, 4900) for key, value in tags.items()}
        run = self._client.create_run(self._experiment_id, tags=tags, run_name=_text(name, 250))
        if sweep.tags is None:  # nobody else will end it
            self._client.set_terminated(run.info.run_id, "FINISHED")
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

    # --- writing ----------------------------------------------------------------------------

    def parent(self) -> str:
        """Return MLflow's id of the evolution's run.

        Raises:
            LookupError: it has not been created yet.
        """
        try:
            return self.known[""]
        except KeyError:
            raise LookupError("no event of kind 'run' was followed before this one") from None

    def run_for(self, individual_id: str, name: str, start: int) -> str:
        """Return the run with these identifying tags, created if there is none."""
        if individual_id not in self.known:
            tags = {"darwin.run_id": self._run_id}
            if individual_id:
                tags |= {"individual_id": individual_id, "mlflow.parentRunId": self.parent()}
            run = self._client.create_run(
                self._experiment_id, start_time=start, tags=tags, run_name=_text(name, 250)
            )
            self.known[individual_id] = str(run.info.run_id)
        return self.known[individual_id]

    def log(
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

        numbers = {key: finite(value) for key, value in (metrics or {}).items()}
        all_metrics = [
            Metric(tidy(key), value, timestamp, step)
            for key, value in numbers.items()
            if value is not None
        ]
        all_params = [Param(tidy(k), _text(v, 5900)) for k, v in _known(params)]
        all_tags = [RunTag(tidy(k), _text(v, 4900)) for k, v in _known(tags)]
        size = 90  # MLflow takes 100 parameters and tags, and 1000 metrics, at a time
        for at in range(0, max(len(all_params), len(all_tags), len(all_metrics)), size):
            self._client.log_batch(
                run,
                metrics=all_metrics[at : at + size],
                params=all_params[at : at + size],
                tags=all_tags[at : at + size],
            )

    def upload(self, run: str, folder: Path, names: Sequence[str]) -> None:
        """Upload those of a folder's files and folders that are there and not symlinks."""
        for name in names:
            path = folder / name
            if path.is_symlink():
                continue
            if path.is_dir():
                self._client.log_artifacts(run, str(path), name)
            elif path.is_file():
                self._client.log_artifact(run, str(path))

    def trace(self, run: str, traces: Sequence[Trace]) -> None:
        """Tie calls of language models to a run, each once."""
        write_traces(self._client, self._experiment_id, run, traces)

    def reopen(self, run: str) -> None:
        """Mark a run as running again."""
        self._client.update_run(run, status="RUNNING")

    def end(self, run: str, status: str, at: int) -> None:
        """Mark a run as ended with one of MLflow's statuses, at a time in milliseconds."""
        self._client.set_terminated(run, status, at)


def writable_client(store_uri: str) -> Any:
    """Return a client of a store that takes writes now.

    Raises:
        StoreUnavailable: its SQLite file cannot be written.
    """
    client_class = _quiet_client_class()
    with _alone(_sqlite_file(store_uri)):
        _probe(_sqlite_file(store_uri))
        return client_class(store_uri)


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


def finite(value: Any) -> float | None:
    """Return a finite number, or None for everything else; a truth value is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _known(values: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in (values or {}).items() if value not in (None, "")]


def tidy(name: str) -> str:
    """Return a name with what MLflow refuses in names of metrics and tags replaced."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", "_", name)[:250]


def _text(value: Any, limit: int) -> str:
    """Return a value as text that every store can hold, cut to a number of characters."""
    text = storable(value if isinstance(value, str) else _spelled(value))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _spelled(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | tuple | Mapping) else str(value)
