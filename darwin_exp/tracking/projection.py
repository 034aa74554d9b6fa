"""What each event of the journal becomes in MLflow.

Reads: events, and the files that a run left in its folder.
Writes: runs, metrics, parameters, tags and files of a store; `plots/` and, where people took
part, `people.json` in the run's folder.
Never: decides whether or when an event is delivered; that is the outbox's part.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from darwin_exp.plots import generation_plots
from darwin_exp.protocols import Event
from darwin_exp.tracking.people import People, in_last_environment, tags_of
from darwin_exp.tracking.store import EvolutionRuns, finite
from darwin_exp.tracking.traces import ANSWERED, traces_of

SECONDS_BETWEEN_PLOTS = 60.0

ARTIFACTS = ("code", "change.patch", "memory.json", "evaluation.json", "train.log", "error.txt")
CLOSING_ARTIFACTS = ("summary.json", "report.html", "champion")
END_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "stopped": "KILLED"}
RATES = ("mfu", "tokens_per_second")
HEADLINE = ("val_perplexity", "mfu", "fitness")

NOTE = """**Evolution of training code.** Each nested run is one agent: the code it trained, the
change that made it, its log and what the trusted evaluator measured.

- `best_val_perplexity`, `mean_val_perplexity` by generation (step): lower is better.
- `best_mfu`, `mean_mfu`: share of the machine's peak that the training used, 0 to 1.
- `claim_*`, `equal_steps_*`: the closing comparison of the base with the selected agent, on fresh
  seeds: by the clock, and after the same number of optimizer steps.
- `plots/` shows every agent; nested runs carry `status`, `parent_ids` and `editor_id` as tags.
- `llm_*`, where language models edit: calls, tokens and dollars so far. Each call is a trace of the
  agent that it was made for: the Traces tab of its run, or of the experiment.
"""


class Projection:
    """One evolution as MLflow runs. Every event may be written again without changing anything."""

    def __init__(self, runs: EvolutionRuns, run_folder: Path, parent_tags: dict[str, str]) -> None:
        """Project into these runs.

        Args:
            run_folder: `runs/RUN_ID`, whose files are uploaded; its name is the run's id.
            parent_tags: further tags of the evolution's run.
        """
        self._runs = runs
        self._run_folder = run_folder
        self._run_id = run_folder.name
        self._parent_tags = parent_tags
        self._plotted_at = time.monotonic()
        self._people = People(runs, run_folder)
        self._kinds: dict[str, Callable[[Event, Sequence[Event]], None]] = {
            "run": self._on_run,
            "session": self._on_session,
            "individual": self._on_individual,
            "generation": self._on_generation,
            "job": self._on_job,
            "claim": self._on_claim,
            "equal_steps": self._on_claim,
            "retimed": self._on_retimed,
            "end": self._on_end,
            **self._people.kinds,
        }

    def deliver(self, event: Event, history: Sequence[Event], stop: Callable[[], bool]) -> None:
        """Write one event; kinds that mean nothing to MLflow are passed over.

        Raises:
            StoreUnavailable: the SQLite file cannot be written now.
            InterruptedError: `stop` said so before anything was written.
        """
        handler = self._kinds.get(event.kind)
        if handler is None:
            return
        self._runs.probe()
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
        if self._runs.sweep is not None and self._runs.sweep_run is not None:
            tags |= {
                "darwin.sweep_id": self._runs.sweep.sweep_id,
                "mlflow.parentRunId": self._runs.sweep_run,
            }
        run = self._runs.run_for("", self._run_id, _milliseconds(event))
        params = _flat(payload.get("config", {}))
        params |= _flat(payload.get("environment", {}), "environment.")
        self._runs.log(run, params=params, tags=tags)

    def _on_session(self, event: Event, history: Sequence[Event]) -> None:
        if event.payload.get("what") == "resumed":
            self._runs.reopen(self._runs.parent())

    def _on_individual(self, event: Event, history: Sequence[Event]) -> None:
        payload, measured = event.payload, event.measured
        individual_id = str(payload.get("individual_id", event.key))
        summary = str(payload.get("summary") or "base")
        seconds = {
            name: finite(measured.get(name)) or 0.0
            for name in (
                "startup_seconds",
                "training_seconds",
                "scoring_seconds",
                "overhead_seconds",
            )
        }
        end = _milliseconds(event)
        start = max(0, end - int(1000 * sum(seconds.values())))
        parent = self._runs.parent()
        run = self._runs.run_for(individual_id, f"{individual_id} {summary[:60]}", start)
        status, reason = str(payload.get("status")), payload.get("reason")
        edits = list(payload.get("edits", ()))
        n_new = int(payload.get("n_new_edits", 0))
        model = payload.get("model") or {}
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
            "model_endpoint": model.get("base_url"),
            **tags_of(event, history),
        }
        new_edits = edits[len(edits) - n_new :]
        params = {
            "summary": summary,
            "operators": ", ".join(str(edit.get("operator")) for edit in edits),
            "new_operators": ", ".join(str(edit.get("operator")) for edit in new_edits),
            "expected_effect": payload.get("expected_effect") or None,
            "model": _name_of_model(model),
        }
        metrics = {
            **dict(payload.get("metrics", {})),
            **dict(measured.get("rates", {})),
            **seconds,
            "fitness": payload.get("fitness", measured.get("fitness")),
            "attempts": payload.get("attempts"),
        }
        step = int(payload.get("generation", 0))
        self._runs.log(run, metrics=metrics, params=params, tags=tags, timestamp=end, step=step)
        self._runs.upload(run, self._run_folder / "individuals" / individual_id, ARTIFACTS)
        self._runs.end(run, "FINISHED" if status == "OK" else "FAILED", end)
        if traces := traces_of(event, history, self._run_id):
            self._runs.trace(run, traces)

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
        metrics |= _spent(event, history)
        step = int(event.payload.get("generation", event.key))
        tags = {"best_id": event.payload.get("best_id")}
        self._runs.log(
            self._runs.parent(),
            metrics=metrics,
            tags=tags,
            timestamp=_milliseconds(event),
            step=step,
        )
        self._people.sum_up(event, history, step)
        if time.monotonic() - self._plotted_at > SECONDS_BETWEEN_PLOTS:
            self._plot(history)

    def _on_job(self, event: Event, history: Sequence[Event]) -> None:
        purpose = event.payload.get("purpose")
        if purpose in (None, "search"):
            return
        name, n_steps = str(purpose), event.payload.get("max_steps")
        environment = event.payload.get("environment", 0)
        if environment:  # in a curve of its own: it is not to be compared with those before
            name += f"_environment_{environment}"
        if purpose != "base_repeat":
            name += f"_{event.payload.get('individual_id')}"
            name += "" if n_steps is None else f"_{n_steps}_steps"

        def same_series(other: Event) -> bool:
            keys = ("purpose", "individual_id", "max_steps", "environment")
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
        # Of a claim's trainings no rate is bounded: what those say of MFU is the genome's own word.
        shown = {"mfu"} if purpose == "base_repeat" else set()
        metrics = {f"{name}_{k}": v for k, v in found.items() if "perplexity" in k or k in shown}
        self._runs.log(
            self._runs.parent(), metrics=metrics, timestamp=_milliseconds(event), step=step
        )

    def _on_claim(self, event: Event, history: Sequence[Event]) -> None:
        about = {name: value for name, value in event.payload.items() if name != "claim"}
        claim = event.payload.get("claim") or {}
        flat = _flat({**about, **claim}, f"{event.kind}_", separator="_")
        numbers = {key: value for key, value in flat.items() if finite(value) is not None}
        words = {key: value for key, value in flat.items() if key not in numbers}
        self._runs.log(
            self._runs.parent(), metrics=numbers, tags=words, timestamp=_milliseconds(event)
        )

    def _on_retimed(self, event: Event, history: Sequence[Event]) -> None:
        run = self._runs.known.get(str(event.payload.get("individual_id")))
        if run is None:
            return
        metrics = {f"{name}_retimed": event.measured.get(name) for name in RATES}
        self._runs.log(run, metrics=metrics, timestamp=_milliseconds(event))

    def _headline(self) -> dict[str, Any]:
        """Return the headline figures of summary.json, which was written before the run's end."""
        try:
            told = json.loads((self._run_folder / "summary.json").read_text(encoding="utf-8"))
            gain = told["improvement"]
            at_steps = gain["equal_steps"] or {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {
            "error_rate": told.get("error_rate"),
            "resolution_rate": told.get("resolution_rate"),
            "improvement_percent": gain.get("perplexity_percent"),
            "improvement_percent_at_equal_steps": at_steps.get("perplexity_percent"),
            "mfu_percent": gain.get("mfu_percent"),
        }

    def _on_end(self, event: Event, history: Sequence[Event]) -> None:
        parent, end = self._runs.parent(), _milliseconds(event)
        status = str(event.payload.get("status"))
        tags = {"darwin.status": status, "darwin.exit_code": event.payload.get("exit_code")}
        metrics = {"total_seconds": event.measured.get("seconds"), **self._headline()}
        self._runs.log(parent, metrics=metrics, tags=tags, timestamp=end)
        closed = [int(e.payload["generation"]) for e in history if e.kind == "generation"]
        if spent := _spent(event, history):
            self._runs.log(parent, metrics=spent, timestamp=end, step=max(closed, default=0))
        self._people.sum_up(event, history, max(closed, default=0))
        self._plot(history)
        self._runs.upload(parent, self._run_folder, CLOSING_ARTIFACTS)
        self._runs.end(parent, END_STATUS.get(status, "FAILED"), end)

    def _plot(self, history: Sequence[Event]) -> None:
        folder = self._run_folder / "plots"
        generation_plots(folder, *in_last_environment(history))
        self._runs.upload(self._runs.parent(), self._run_folder, ("plots",))
        self._plotted_at = time.monotonic()


def _note_of_individual(payload: Mapping[str, Any], edits: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"- `{edit.get('operator')}` in `{edit.get('file')}`: {edit.get('why')}" for edit in edits
    ]
    if payload.get("message"):
        lines += ["", f"**{payload.get('status')}** {payload.get('message')}"]
    return "\n".join(lines)


def _name_of_model(model: Mapping[str, Any]) -> str | None:
    """Return a language model's name with its temperature; None where an agent owns none."""
    name, temperature = model.get("name"), model.get("temperature")
    if name is None:
        return None
    return str(name) if temperature is None else f"{name}@{temperature:g}"


def _spent(event: Event, history: Sequence[Event]) -> dict[str, Any]:
    """Return what language models were asked and cost up to an event; nothing where none was.

    The dollars are None as soon as one answer's price is not known.
    """
    answers = [
        one.payload for one in history if one.kind == ANSWERED and one.sequence <= event.sequence
    ]
    if not answers:
        return {}
    prices = [answer.get("usd") for answer in answers]
    return {
        "llm_calls": len(answers),
        "llm_tokens_in": sum(answer["tokens_in"] for answer in answers),
        "llm_tokens_out": sum(answer["tokens_out"] for answer in answers),
        "llm_usd": None if None in prices else sum(prices),
    }


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
