"""MLflow as a projection of the journal, written behind the evolution's back.

Reads: events of the journal, and the files that a run left in its folder.
Writes: an MLflow store, and `tracking.json` (how far delivery has come) in the run's folder.
Never: holds up or fails the evolution; what MLflow cannot take now waits, and what is still
waiting at the end is delivered when the journal is followed again. Nothing reads MLflow back
to decide anything, so a lost store costs nothing but a rebuild.

`outbox.py` decides when an event is delivered, `projection.py` what it becomes, and `store.py`
knows MLflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from darwin_exp.protocols import Event
from darwin_exp.tracking.outbox import Outbox
from darwin_exp.tracking.projection import Projection
from darwin_exp.tracking.store import EvolutionRuns, SweepParent, initialise_store
from darwin_exp.tracking.sweeps import SweepRecord, publish_sweep

__all__ = [
    "MlflowTracker",
    "NullTracker",
    "SweepRecord",
    "initialise_store",
    "publish_sweep",
    "store_of",
]


def store_of(runs: Path) -> str:
    """Return the address of the store that the runs of a folder share."""
    return f"sqlite:///{runs / 'mlflow.sqlite'}"


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
        sweep_tags: Mapping[str, str] | None = None,
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
            sweep_tags: tags of the sweep's run, from the process that works at the sweep; None
                from one that resumes a single run of it.
        """
        sweep = None if sweep_id is None else SweepParent(sweep_id, sweep_tags)
        self._runs = EvolutionRuns(store_uri, artifact_folder, experiment, run_folder.name, sweep)
        projection = Projection(self._runs, run_folder, dict(parent_tags or {}))
        cursor = cursor or run_folder / "tracking.json"
        super().__init__(self._runs, projection.deliver, cursor, store_uri)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the evolution's run; None until it has been created or found."""
        return self._runs.known.get("")
