"""A whole sweep in MLflow: how it ended, and what its comparison found.

Reads: the store, to find the runs that a sweep's evolutions made for it.
Writes: status, tags, curves and files of those runs.
Never: makes a run for a sweep that has none, or waits for a store that takes no writes now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from darwin_exp.tracking.store import SweepParent, tidy, writable_client

POINTS_AT_A_TIME = 900  # MLflow takes 1000 metrics in one call


@dataclass(frozen=True)
class SweepRecord:
    """What is to be known of a sweep.

    Attributes:
        status: one of MLflow's: FINISHED, FAILED or KILLED; None leaves it as it is.
        curves: by name, (step, value) points; a curve that is there already is left alone, so its
            name has to say which runs it was drawn from.
        files: uploaded beside it, replacing those of the same name.
        at: milliseconds since the epoch.
    """

    status: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    files: Sequence[Path] = ()
    at: int = 0


def publish_sweep(store_uri: str, sweep_id: str, record: SweepRecord) -> int:
    """Write a record to every run that stands for a sweep, and return how many there are.

    There is one in each experiment that the sweep's evolutions belong to.

    Raises:
        StoreUnavailable: the SQLite file cannot be written now.
        Exception: whatever else MLflow finds wrong with its store.
    """
    from mlflow.entities import Metric, RunTag

    client = writable_client(store_uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    if not experiments:
        return 0
    parents = client.search_runs(experiments, SweepParent(sweep_id).condition)
    for parent in parents:
        run = parent.info.run_id
        points = [
            Metric(tidy(name), value, record.at, step)
            for name, curve in record.curves.items()
            if tidy(name) not in parent.data.metrics
            for step, value in curve
        ]
        tags = [RunTag(key, value) for key, value in record.tags.items()]
        for at in range(0, max(len(points), 1), POINTS_AT_A_TIME):
            client.log_batch(run, metrics=points[at : at + POINTS_AT_A_TIME], tags=tags)
        for path in record.files:
            client.log_artifact(run, str(path))
        if record.status is not None:
            client.set_terminated(run, record.status)
    return len(parents)
