"""What people said, what came of it, and the environments it opened, as MLflow shows them.

Reads: the events "inbox", "review", "effect", "withdrawn", "paused", "environment", "remeasured".
Writes: tags, metrics and `people.json` of the evolution's run; tags and metrics of nested runs.
Never: writes anything into a run that no person had a part in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from darwin_exp.involvement import involvement
from darwin_exp.protocols import Event
from darwin_exp.tracking.store import EvolutionRuns

FILE_NAME = "people.json"
TOLD_KINDS = ("review", "effect", "withdrawn", "environment")
REMEASURED = ("val_perplexity", "val_bpb", "mfu")


class People:
    """People's part of one evolution. Every event may be written again without changing anything.

    Attributes:
        kinds: what is done with each kind of event that there is because of people.
    """

    def __init__(self, runs: EvolutionRuns, run_folder: Path) -> None:
        self._runs = runs
        self._run_folder = run_folder
        self._n_told = 0  # as far as this process knows
        self.kinds: dict[str, Callable[[Event, Sequence[Event]], None]] = {
            "inbox": self._on_inbox,
            "review": self._on_review,
            "effect": self._on_effect,
            "withdrawn": self._on_effect,
            "environment": self._on_environment,
            "remeasured": self._on_remeasured,
        }

    def sum_up(self, event: Event, history: Sequence[Event], step: int) -> None:
        """Write what adds up, and the file with all of it; nothing where nobody took part.

        Args:
            event: a generation's end, or the run's; what came later does not add to it.
        """
        told = list(_told(history))
        until_then = involvement(one for one in history if one.sequence <= event.sequence)
        if until_then:
            metrics = {
                "people_asked": until_then.in_numbers["asked"],
                "review_idle_seconds": until_then.idle_seconds if until_then.reviews else None,
                "paused_seconds": until_then.paused_seconds or None,
            }
            at = int(1000 * event.written_at)
            self._runs.log(self._runs.parent(), metrics=metrics, timestamp=at, step=step)
        if len(told) > self._n_told:
            self._write(told)
            self._runs.upload(self._runs.parent(), self._run_folder, (FILE_NAME,))
            self._n_told = len(told)

    def _write(self, told: Sequence[Mapping[str, Any]]) -> None:
        path = self._run_folder / FILE_NAME
        draft = path.with_name(f"{FILE_NAME}.new")
        text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
        draft.write_text(text, encoding="utf-8", errors="replace")
        draft.replace(path)

    # --- one event -------------------------------------------------------------------------------

    def _on_inbox(self, event: Event, history: Sequence[Event]) -> None:
        if event.payload["entries"]:
            self._count(history)

    def _count(self, history: Sequence[Event]) -> None:
        numbers = involvement(history).in_numbers
        tags = {
            "people.granted": numbers["granted"],
            "people.denied": numbers["denied"] + numbers["expired"],
            "people.waiting": numbers["waiting"],
        }
        self._runs.log(self._runs.parent(), tags=tags)

    def _on_review(self, event: Event, history: Sequence[Event]) -> None:
        self._count(history)
        # That of an edit comes before the run of whom it makes, which then asks for it by itself.
        name = str(event.payload["individual_id"])
        if run := self._runs.known.get(name):
            self._runs.log(run, tags={"review": review_of(name, history)})

    def _on_effect(self, event: Event, history: Sequence[Event]) -> None:
        payload = event.payload
        ended = "withdrawn" if event.kind == "withdrawn" else payload["outcome"]
        words = f"{ended} in generation {payload['generation']}: {payload['message']}"
        self._runs.log(self._runs.parent(), tags={f"effect.{payload['request_id']}": words})

    def _on_environment(self, event: Event, history: Sequence[Event]) -> None:
        last = [one for one in history if one.kind == "environment"][-1].payload
        tags = {"environment_id": last["environment_id"], "environments": last["index"] + 1}
        self._runs.log(self._runs.parent(), tags=tags)

    def _on_remeasured(self, event: Event, history: Sequence[Event]) -> None:
        payload, measured = event.payload, event.measured
        run = self._runs.known.get(str(payload["individual_id"]))
        if run is None:
            return
        opened = _opened(payload["environment"], history)
        found = {**payload["metrics"], **measured.get("rates", {})}
        metrics = {name: found.get(name) for name in REMEASURED}
        failed = None if payload["status"] == "OK" else f"{payload['status']}: {payload['message']}"
        self._runs.log(
            run,
            metrics={**metrics, "fitness": payload["fitness"]},
            tags={"environment_id": opened.get("environment_id"), "remeasured": failed},
            timestamp=int(1000 * event.written_at),
            # Generations are the steps of a nested run, and MLflow shows the value of the last.
            step=int(opened.get("generation", 0)),
        )


# --- from the journal -----------------------------------------------------------------------------


def tags_of(individual: Event, history: Sequence[Event]) -> dict[str, Any]:
    """Return what an individual's run says of people; all of it None where they had no part."""
    opened = _opened(individual.payload.get("environment", 0), history)
    return {
        "review": review_of(str(individual.payload.get("individual_id")), history),
        "environment_id": opened.get("environment_id"),
    }


def review_of(individual_id: str, history: Sequence[Event]) -> str | None:
    """Return in words how the last review of an individual ended; None where there was none."""
    for event in reversed(history):
        if event.kind == "review" and event.payload["individual_id"] == individual_id:
            told, note = event.payload, str(event.payload["note"])
            is_named = note.startswith(told["by"]) or told["verdict"] == "expired"
            by = "" if is_named else f" by {told['by']}"
            return f"{told['verdict']}{by}" + (f": {note}" if note else "")
    return None


def _opened(index: int, history: Sequence[Event]) -> Mapping[str, Any]:
    """Return what the journal tells of one of the environments; nothing of the first."""
    opened = (event.payload for event in history if event.kind == "environment")
    return next((one for one in opened if one["index"] == index), {})


def in_last_environment(
    history: Sequence[Event],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return individuals, generations and base runs as they can be compared with one another.

    Whoever was measured again stands there with what was found last; whoever was only measured in
    an earlier environment is left out, and whoever failed is not.
    """
    last = max((e.payload["index"] for e in history if e.kind == "environment"), default=0)
    again = {
        e.payload["individual_id"]: e
        for e in history
        if e.kind == "remeasured" and e.payload["environment"] == last
    }

    def is_of_last(event: Event) -> bool:
        return bool(event.payload.get("environment", 0) == last)

    individuals = []
    for event in (e for e in history if e.kind == "individual"):
        told = {**event.measured, **event.payload}
        found = again.get(event.payload.get("individual_id"))
        if found is not None:
            told |= {**found.measured, **found.payload}
        elif not is_of_last(event) and told.get("status") == "OK":
            continue
        individuals.append(told)
    generations = [{**e.measured, **e.payload} for e in history if e.kind == "generation"]
    bases = [
        {**e.measured, **e.payload}
        for e in history
        if e.kind == "job" and e.payload.get("purpose") == "base_repeat" and is_of_last(e)
    ]
    return individuals, generations, bases


def _told(history: Sequence[Event]) -> Iterator[dict[str, Any]]:
    """Yield what people said and what came of it, in the order in which the run took it."""
    for event in history:
        if event.kind == "inbox":
            for entry in event.payload["entries"]:
                yield {"what": "entry", "taken_at": event.key, **entry}
        elif event.kind in TOLD_KINDS:
            yield {
                "what": event.kind,
                "key": event.key,
                "payload": event.payload,
                "measured": event.measured,
                "written_at": event.written_at,
            }
