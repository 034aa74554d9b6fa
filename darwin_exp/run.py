"""One run: its folder, its journal and this process's part in it, from config to exit code.

Reads: the configuration; of a resumed run, what it recorded.
Writes: runs/RUN_ID/ (config.yaml, journal.sqlite, summary.json, champion/, report.html) and
runs/latest.
Never: decides what the evolution does.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from darwin_exp import model_access, people_access
from darwin_exp import parts as workshop_of
from darwin_exp import summary as summaries
from darwin_exp.champion import leave_champion
from darwin_exp.chronicle import Chronicle
from darwin_exp.config import ConfigError, from_yaml, leaves, refuse_changed_score
from darwin_exp.display import Watch
from darwin_exp.evolution import Parts, evolve
from darwin_exp.hitl.inbox import InboxError
from darwin_exp.individual import Genome
from darwin_exp.journal import Divergence, Journal, JournalError
from darwin_exp.measuring import BaseFailed
from darwin_exp.parts import Workshop, folder
from darwin_exp.people import People
from darwin_exp.protocols import Event, Interrupted, ModelsUnavailable, Mutator, Stopped, Tracker
from darwin_exp.report import write_from
from darwin_exp.resuming import applicable, refuse_other_environment, refuse_shorter
from darwin_exp.reviews import Reviews
from darwin_exp.run_folder import (
    find_run,
    journal_of,
    new_folder,
    point_latest_to,
    write_config,
    write_whole,
)
from darwin_exp.schema import DarwinConfig, OpenaiConfig, Scope
from darwin_exp.sweep import Overrides, enlist
from darwin_exp.tracking import MlflowTracker, NullTracker, store_of
from darwin_exp.trials import Bench, Broken, Trials

READY_SECONDS = 60.0  # MLflow's first start makes its tables; training waits for it to be quiet
HURRIED_SECONDS = 10.0


@dataclass(frozen=True)
class Command:
    """What was typed.

    Attributes:
        text: the command line, for people.
        overrides: `key=value` as typed.
        chosen: the composed node of every group whose variant was typed.
        sweep_folder: of the sweep that this run belongs to, if any.
        job: what tells it apart within that sweep.
        sweep_tags: what MLflow is told of the sweep.
    """

    text: str
    overrides: tuple[str, ...] = ()
    chosen: Mapping[str, Any] | None = None
    sweep_folder: Path | None = None
    job: Overrides = frozenset()
    sweep_tags: Mapping[str, str] | None = None

    @property
    def sweep_id(self) -> str | None:
        return None if self.sweep_folder is None else self.sweep_folder.name


def run(config: DarwinConfig, command: Command, watch: Watch) -> int:
    """Start a run, or go on with one, and return its exit code.

    Raises:
        ConfigError: nothing could be started; nothing was written.
        KeyboardInterrupt: somebody interrupted the preparation.
    """
    if config.resume is not None:
        return _resume(config, command, watch)
    in_sweep = command.sweep_folder is not None
    if in_sweep and getattr(config.memory, "scope", None) is Scope.library:
        raise ConfigError(
            "memory.scope=library: the jobs of a sweep would learn from one another; use "
            "memory.scope=population"
        )
    workshop = workshop_of.prepare_workshop(config, watch.note, may_fall_back=not in_sweep)
    run_folder = new_folder(folder(config.paths.runs))
    with journal_of(run_folder) as journal:
        write_config(run_folder, config)
        point_latest_to(run_folder)
        if command.sweep_folder is not None:
            enlist(command.sweep_folder, run_folder, command.text, command.job)
        return _Session(workshop, run_folder, journal, command, watch).work()


def _resume(config: DarwinConfig, command: Command, watch: Watch) -> int:
    run_folder = find_run(folder(config.paths.runs), str(config.resume))
    recorded = from_yaml(run_folder / "config.yaml", [], {})
    overrides = applicable(command.overrides, recorded)
    wanted = from_yaml(run_folder / "config.yaml", overrides, command.chosen or {})
    refuse_changed_score(recorded, wanted)
    wanted.resume = None
    with journal_of(run_folder) as journal:
        begun = journal.find("run", "run")
        base = None if begun is None else Genome.of(begun.payload["files"])
        workshop = workshop_of.prepare_workshop(wanted, watch.note, base, may_fall_back=False)
        if begun is not None:
            refuse_other_environment(run_folder, begun, workshop)
        refuse_shorter(wanted, journal)
        write_config(run_folder, wanted)
        return _Session(workshop, run_folder, journal, command, watch).work()


class _Session:
    """One process's work at one run."""

    def __init__(
        self,
        workshop: Workshop,
        run_folder: Path,
        journal: Journal,
        command: Command,
        watch: Watch,
    ) -> None:
        self.workshop = workshop
        self.config = workshop.config
        self.run_folder = run_folder
        self.journal = journal
        self.command = command
        self.watch = watch
        self.plan = workshop_of.build_plan(workshop.config, workshop.data)
        self.message = ""
        self._held_off: list[int] = []  # signals that came while things were put in order

    def work(self) -> int:
        """Evolve until the end, a cap or an interruption, and leave a truthful summary."""
        tracker = self._tracker()
        status = summaries.FAILED
        with self.watch:
            try:
                self._begin()
                self.journal.listen(tracker.follow)
                status = self._evolve(tracker)
            except (KeyboardInterrupt, Interrupted):
                status = summaries.INTERRUPTED
            except Divergence as failure:
                self.message = str(failure)
            except (JournalError, InboxError, OSError) as failure:
                self.message = f"{failure}; then go on with resume={self.run_folder.name}"
            except Exception:
                with _uninterrupted(self._held_off):  # a defect of ours: leave order, show it
                    self._end(status, tracker)
                raise
            with _uninterrupted(self._held_off):
                summary = self._end(status, tracker)
                self.watch.finished(summary)
                if self.message and self._held_off:
                    self.watch.note(self.message)
        if self._held_off and self.command.sweep_folder is not None:
            raise KeyboardInterrupt  # this run has ended as it would have; its sweep must not go on
        if self.message:
            raise ConfigError(self.message)
        return int(summary["exit_code"])

    def _begin(self) -> None:
        """Record that this process works at the run and, the first time, what the run is."""
        n = len(self.journal.of_kind("session"))
        self.journal.append(
            "session",
            str(n),
            {"what": "resumed" if n else "started"},
            {"pid": os.getpid(), "host": socket.gethostname(), "command": self.command.text},
        )
        begun = self.journal.find("run", "run")
        peak = begun.measured["peak_flops"] if begun else None
        if begun is None and self.workshop.recording is None:
            peak = workshop_of.measure_peak(self.workshop, self.watch.note)
        key = self.config.integrity.key or secrets.token_hex(32)
        workshop = self.workshop
        self.run_event: Event = self.journal.once(
            "run",
            "run",
            lambda: (
                {
                    "config": {name: value for name, value, _ in leaves(self.config)},
                    "environment": workshop.environment,
                    "environment_id": workshop.environment_id,
                    "files": workshop.base.as_dict,
                    "integrity_key": key,
                },
                {
                    "run_id": self.run_folder.name,
                    "command": self.command.text,
                    "host": socket.gethostname(),
                    "peak_flops": peak,
                    "n_slots": len(workshop.slots),
                    "image": workshop.image,
                    "sweep_id": self.command.sweep_id,
                },
            ),
            given={"base_genome_id": workshop.base.id},
        )
        self.watch.run_started(self.run_folder.name, self._title(), self.plan.n_requested)

    def _title(self) -> list[str]:
        config, data = self.config, self.workshop.data
        clock = f"{config.budget_seconds:g} s"
        if config.max_steps is not None:
            clock = f"{config.max_steps} steps (at most {clock})"
        slots = f"{len(self.workshop.slots)} slot(s) of {config.sandbox.threads} thread(s)"
        return [
            f"{config.experiment}: {self.plan.n_requested} rewrites, {clock} each, {slots}",
            f"data {config.dataset.name} ({data.vocab_size} symbols), sandbox "
            f"{config.sandbox.name}, mutator {config.mutator.name}, "
            f"selection {config.selection.name}, memory {config.memory.name}",
        ]

    def _evolve(self, tracker: Tracker) -> str:
        config, workshop = self.config, self.workshop
        if workshop.recording is not None:
            self.journal.heed(workshop.recording.decisions)
        peak = self.run_event.measured["peak_flops"]
        training, evaluation, box = workshop_of.build_specs(config, peak)
        bench = Bench(
            seed=config.seed,
            integrity_key=bytes.fromhex(self.run_event.payload["integrity_key"]),
            data=workshop.data,
            training=training,
            evaluation=evaluation,
            sandbox=box,
            run_folder=self.run_folder,
        )
        memory = workshop_of.build_memory(config, self.run_folder.name, self.journal)
        executor = workshop_of.build_executor(workshop, self.watch.slot)
        trials = Trials(bench, executor, self.journal)
        try:
            people, reviews = self._people(trials, executor.n_slots)
        except InboxError:
            trials.stop()
            raise
        runs, data = folder(config.paths.runs), folder(config.paths.data)
        try:
            parts = Parts(
                mutator=self._mutator(trials.stopping),
                selector=workshop_of.build_selector(config.selection),
                fitness=workshop_of.build_fitness(config.fitness),
                memory=memory,
                trials=trials,
                journal=self.journal,
                people=people,
                reviews=reviews,
                effects=people_access.build_effects(
                    config, self.journal, workshop.data, data, (runs,), self.watch.note
                ),
                watch=self.watch,
                n_slots=executor.n_slots,
                run_folder=self.run_folder,
            )
            tracker.ready(READY_SECONDS)  # the sandboxes warm up meanwhile
            evolve(workshop.base, self.plan, parts)
            return summaries.FINISHED
        except Stopped as cap:
            self.watch.note(f"stopped: {cap}")
            return summaries.STOPPED
        except (Broken, ModelsUnavailable) as failure:
            self.message = f"{failure}. Mend that, then go on with resume={self.run_folder.name}"
            return summaries.FAILED
        except BaseFailed as failure:
            self.message = str(failure)
            return summaries.FAILED
        finally:
            with _uninterrupted(self._held_off):
                trials.stop()  # whoever still waits for a model or a person waits no longer
                people.close()
            for problem in memory.problems:
                self.watch.note(f"memory: {problem}")

    def _people(self, trials: Trials, n_slots: int) -> tuple[People, Reviews]:
        recorded = self.workshop.recording
        return people_access.build_people(
            self.config,
            self.run_folder,
            self.journal,
            n_slots,
            trials.stopping,
            self.watch.note,
            self.watch.people_wait,
            None if recorded is None else recorded.decisions,
        )

    def _mutator(self, stopping: threading.Event) -> Mutator:
        config, workshop = self.config, self.workshop
        if not isinstance(config.mutator, OpenaiConfig):
            return workshop_of.build_mutator(config.mutator)
        return model_access.build_mutator(
            config,
            workshop.data,
            workshop.environment["machine"],
            self.journal,
            stopping,
            self.watch.note,
            workshop.recording,
            folder(config.paths.data),
        )

    def _end(self, status: str, tracker: Tracker) -> dict[str, Any]:
        """Leave champion and summary, tell the journal how it ended, and let MLflow catch up."""
        events = self.journal.events()
        if self.journal.find("run", "run") is None:
            tracker.close(0.0)
            interrupted = status == summaries.INTERRUPTED
            code = summaries.BY_SIGNAL if interrupted else summaries.WRONG
            return {"run_id": self.run_folder.name, "status": status, "exit_code": code}
        summary = summaries.summarise(events, self.plan.n_requested, status)
        self._write_summary(summary)
        self._leave_products(events, summary, status)
        with suppress(JournalError):  # a journal that refuses to be written has said so already
            n = len(self.journal.of_kind("end"))
            self.journal.append(
                "end",
                str(n),
                {"status": status, "exit_code": summary["exit_code"]},
                {"seconds": summary["seconds"]["total"]},
            )
        hurried = status == summaries.INTERRUPTED
        waiting = self.config.tracking.closing_seconds
        behind = tracker.close(min(waiting, HURRIED_SECONDS) if hurried else waiting)
        if behind:
            self.watch.note(
                f"MLflow is {behind} events behind; resume={self.run_folder.name} delivers them"
            )
        summary["mlflow_run_id"] = tracker.run_id
        self._write_summary(summary)
        return summary

    def _write_summary(self, summary: Mapping[str, Any]) -> None:
        with suppress(OSError):
            write_whole(self.run_folder / "summary.json", json.dumps(summary, indent=2) + "\n")

    def _leave_products(
        self, events: Sequence[Event], summary: Mapping[str, Any], status: str
    ) -> None:
        """Write champion and report: both can be made again from the journal, whatever happens."""
        try:
            model_access.keep_recording(self.config, events)
        except OSError as failure:
            self.watch.note(f"llm.recording: {failure.strerror}: {failure.filename}")
        chronicle = Chronicle.of(events)
        training, _, _ = workshop_of.build_specs(self.config, None)

        def champion() -> None:
            leave_champion(self.run_folder, chronicle, summary, self.workshop.data, training)

        def report() -> None:
            write_from(chronicle, self.run_folder, status)

        # Whoever interrupted wants to be gone; darwin_exp.report writes the page at any time.
        for make in (champion,) if status == summaries.INTERRUPTED else (champion, report):
            try:
                make()
            except Exception as failure:
                self.watch.note(f"{make.__name__}: could not be written: {failure}")

    def _tracker(self) -> Tracker:
        if self.config.tracking.name == "none":
            return NullTracker()
        runs = self.run_folder.parent
        begun = self.journal.find("run", "run")
        return MlflowTracker(
            store_uri=store_of(runs),
            artifact_folder=runs / "mlartifacts",
            experiment=self.config.experiment,
            run_folder=self.run_folder,
            parent_tags={"darwin.command": self.command.text},
            sweep_id=begun.measured["sweep_id"] if begun else self.command.sweep_id,
            sweep_tags=self.command.sweep_tags,
        )


@contextmanager
def _uninterrupted(came: list[int]) -> Iterator[None]:
    """Hold off Ctrl-C while what is on disk is put in order, which takes seconds.

    Args:
        came: is added the signals that came meanwhile, so that they are not forgotten.
    """

    def note(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
        came.append(signum)

    before = {which: signal.signal(which, note) for which in _ENDING}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


_ENDING = (signal.SIGINT, signal.SIGTERM)
