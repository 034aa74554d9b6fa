"""Effects: carries out what people have approved, and takes back what they have revoked.

Reads: the board of requests at the start of a generation, and the living.
Writes: the journal's "effect" and "withdrawn" events; extra texts and images, through their makers.
Never: does more than the approved content says, or anything twice. What cannot be done is told with
the reason, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from darwin_exp.archive import fitness_or_least
from darwin_exp.births import Commission, name_of
from darwin_exp.conditions import Conditions, ExtraFile
from darwin_exp.hitl.asked import Refused, Standing, hash_of
from darwin_exp.hitl.requests import Board, RequestType, State
from darwin_exp.hitl.wishes import DatasetWish, Setting, TreeWish, requirement_of
from darwin_exp.individual import Individual
from darwin_exp.journal import Journal
from darwin_exp.means import Found, Means, expected_failures, passing_failures
from darwin_exp.protocols import Event
from darwin_exp.trials import BASE_ID

OF_TREES = (RequestType.SCRIPT, RequestType.FILE_STRUCTURE)
OF_CONDITIONS = (RequestType.DATASET, RequestType.LIBRARY, RequestType.RESOURCES)


class _Postponed(Exception):
    """An approval cannot be carried out at the moment."""


@dataclass(frozen=True)
class Carried:
    """What is in force from a generation on.

    Attributes:
        conditions: under which everybody is trained.
        commissions: rewrites to be made in this generation.
        because: requests that were carried out or revoked since the generation before, and change
            the conditions.
    """

    conditions: Conditions
    commissions: tuple[Commission, ...] = ()
    because: tuple[str, ...] = ()


class Effects:
    """Carries out approvals at the starts of generations."""

    def __init__(self, journal: Journal, means: Means) -> None:
        self._journal = journal
        self._means = means

    def carry_out(
        self,
        generation: int,
        board: Board,
        living: Sequence[Individual],
        everyone: Mapping[str, Individual],
        n_offspring: int,
    ) -> Carried:
        """Return what is in force from a generation on, after doing what was approved until then.

        Args:
            living: whose code approved files join.
            everyone: by name, for whom they descend from.
            n_offspring: how many rewrites the generation makes.
        """
        commissions: list[Commission] = []
        for standing in board.requests.values():
            kind, name = standing.request.type, standing.request.request_id
            done = self._of(generation, "effect", name)
            if self._is_postponed(name, generation):
                continue
            if standing.granted_content is not None and done is None:
                if kind in OF_CONDITIONS:
                    self._do(generation, standing, partial(self._condition, standing, generation))
                elif kind in OF_TREES and len(commissions) < n_offspring:
                    slot = n_offspring - 1 - len(commissions)
                    commission = self._commission(generation, standing, living, everyone, slot)
                    commissions += [] if commission is None else [commission]
            elif standing.state is State.REVOKED and done is not None:
                self._take_back(generation, done, everyone)
        because = [
            event.key
            for kind in ("effect", "withdrawn")
            for event in self._journal.of_kind(kind)
            if event.payload["generation"] == generation
            and event.payload["type"] in {one.value for one in OF_CONDITIONS}
            and event.payload.get("outcome") != "failed"
        ]
        return Carried(self._conditions(generation), tuple(commissions), tuple(because))

    def outcast(self, board: Board, everyone: Mapping[str, Individual]) -> frozenset[str]:
        """Return those who live no longer: vetoed, or made of code that was revoked since.

        The base is neither: without it nothing could be compared.
        """
        names = set(board.vetoes)
        for standing in board.requests.values():
            if standing.state is not State.REVOKED:
                continue
            name = standing.request.request_id
            done = self._journal.find("effect", name)
            made = _made_by(done) if done is not None else standing.request.patch_of
            names |= _descendants(made, everyone)
        return frozenset(names - {BASE_ID})

    def withdraw_those_of(self, generation: int, why: str) -> bool:
        """Take back what changed the conditions in a generation, because nothing trains there.

        Returns whether there was such a thing.
        """
        kinds = {kind.value for kind in OF_CONDITIONS}
        theirs = [
            event
            for event in self._journal.of_kind("effect")
            if event.payload["generation"] == generation
            and event.payload["outcome"] == "done"
            and event.payload["type"] in kinds
        ]
        for event in theirs:
            self._withdraw(generation, event, why, ())
        return bool(theirs)

    def came_of(self, agents: Collection[str], generation: int) -> tuple[str, ...]:
        """Return what is in force for everybody, and what of these agents could not be done."""
        told = [
            event.payload["message"]
            for event in self._in_force(generation)
            if event.payload["type"] in {kind.value for kind in OF_CONDITIONS}
        ]
        for event in self._journal.of_kind("effect"):
            payload = event.payload
            failed = payload["outcome"] == "failed" and payload["generation"] <= generation
            if failed and set(payload["askers"]) & set(agents):
                told.append(f"request {event.key} failed: {payload['message']}")
        return tuple(told)

    def verify(self, conditions: Conditions) -> None:
        """Check that what individuals are trained on and in is what was approved.

        Raises:
            Broken: an extra text or an image is missing, or is another one now.
        """
        self._means.verify(conditions)

    # --- what was done ---------------------------------------------------------------------------

    def _of(self, generation: int, kind: str, name: str) -> Event | None:
        """Return what was done of a request before a generation."""
        event = self._journal.find(kind, name)
        return event if event and event.payload["generation"] < generation else None

    def _in_force(self, generation: int) -> list[Event]:
        return [
            event
            for event in self._journal.of_kind("effect")
            if event.payload["outcome"] == "done"
            and event.payload["generation"] <= generation
            and not self._is_withdrawn(event.key, generation)
        ]

    def _is_withdrawn(self, name: str, generation: int) -> bool:
        event = self._journal.find("withdrawn", name)
        return event is not None and event.payload["generation"] <= generation

    def _conditions(self, generation: int) -> Conditions:
        """Fold what is in force, in the order in which it was done."""
        extra: list[ExtraFile] = []
        libraries: list[str] = []
        changed: dict[str, Any] = {}
        for event in self._in_force(generation):
            details = event.payload["details"]
            if event.payload["type"] == RequestType.DATASET.value:
                extra.append(ExtraFile(details["file"], details["content_hash"]))
            elif event.payload["type"] == RequestType.LIBRARY.value:
                libraries += details["import_names"]
            elif event.payload["type"] == RequestType.RESOURCES.value:
                changed[details["key"]] = details["value"]
        image = self._image(generation)
        return Conditions(tuple(extra), image=image, libraries=tuple(libraries), **changed)

    def _image(self, generation: int) -> str | None:
        """Return the image that holds the libraries in force; None for the run's own."""
        image: str | None = None
        for event in self._journal.events():
            if (
                event.kind not in ("effect", "withdrawn")
                or event.payload["generation"] > generation
            ):
                continue
            told = event.payload if event.kind == "withdrawn" else event.payload["details"]
            if event.payload["type"] == RequestType.LIBRARY.value and "image" in told:
                image = told["image"]
        return image

    # --- doing -----------------------------------------------------------------------------------

    def _is_postponed(self, name: str, generation: int) -> bool:
        return self._journal.find("postponed", f"{name}/g{generation:02d}") is not None

    def _do(self, generation: int, standing: Standing, how: Callable[[], Found]) -> Event | None:
        """Carry an approval out, once; None where that has to wait for the next generation."""
        request = standing.request

        def compute() -> tuple[dict[str, Any], dict[str, Any]]:
            outcome = "done"
            details: dict[str, Any] = {}
            try:
                message, details = how()
            except Exception as failure:  # whatever it is, an approval must not end a run
                if isinstance(failure, passing_failures()):
                    raise _Postponed(str(failure)) from failure
                outcome, message = "failed", str(failure)
                if not isinstance(failure, expected_failures()):
                    message = f"{type(failure).__name__}: {failure}"
            self._means.announce(f"{request.type.value} {request.request_id}: {message}")
            return {"outcome": outcome, "message": message, "details": details}, {}

        given = {
            "request_id": request.request_id,
            "type": request.type.value,
            "askers": list(standing.askers),
            "generation": generation,
        }
        try:
            return self._journal.once("effect", request.request_id, compute, given=given)
        except _Postponed as failure:
            words = f"{request.type.value} {request.request_id}: not now ({failure}); tried again"
            self._means.announce(f"{words} at the next generation")
            key = f"{request.request_id}/g{generation:02d}"
            self._journal.append("postponed", key, {"message": str(failure)})
            return None

    def _condition(self, standing: Standing, generation: int) -> Found:
        content = standing.granted_content or ""
        kind = standing.request.type
        if kind is RequestType.DATASET:
            return self._means.dataset(DatasetWish.read(content, self._means.dataset_sources))
        if kind is RequestType.LIBRARY:
            return self._means.library(requirement_of(content), self._conditions(generation).image)
        setting = Setting.read(content)
        return f"{setting.key} is {setting.value:,} from now on", vars(setting)

    def _commission(
        self,
        generation: int,
        standing: Standing,
        living: Sequence[Individual],
        everyone: Mapping[str, Individual],
        slot: int,
    ) -> Commission | None:
        """Return the rewrite of whoever asked first and lives on, in its children at least."""
        request = standing.request
        asker = _heir(standing.askers, living, everyone)
        what = request.type.value.replace("_", " ")

        def how() -> Found:
            if asker is None:
                raise Refused("neither who asked for it nor any descendant lives; ask again")
            wish = TreeWish.read(request.type, standing.granted_content or "")
            changed, removed = wish.changes(asker.genome)
            name = name_of(generation, slot)
            told = f"{what} for {asker.individual_id}: made into {name}"
            return told, {
                "individual_id": name,
                "parent_id": asker.individual_id,
                "changed": changed,
                "removed": removed,
            }

        done = self._do(generation, standing, how)
        if done is None or done.payload["outcome"] == "failed" or asker is None:
            return None
        details = done.payload["details"]
        files = ", ".join([*details["changed"], *details["removed"]])
        return Commission(
            hash_of(standing.granted_content or ""),
            asker,
            f"{what} ({files})",
            request.reason,
            tuple(details["changed"].items()),
            tuple(details["removed"]),
        )

    # --- taking back -----------------------------------------------------------------------------

    def _take_back(self, generation: int, done: Event, everyone: Mapping[str, Individual]) -> None:
        if done.payload["outcome"] != "done" or self._of(generation, "withdrawn", done.key):
            return
        carriers = sorted(_descendants(_made_by(done), everyone))
        what = "its carriers live no longer" if carriers else "it is in force no longer"
        self._withdraw(generation, done, f"revoked: {what}", carriers)

    def _withdraw(
        self, generation: int, done: Event, message: str, carriers: Sequence[str]
    ) -> None:
        def compute() -> tuple[dict[str, Any], dict[str, Any]]:
            self._means.announce(f"{done.payload['type']} {done.key}: {message}")
            told: dict[str, Any] = {"message": message, "carriers": list(carriers)}
            if done.payload["type"] == RequestType.LIBRARY.value:
                left = [
                    event.payload["details"]["requirement"]
                    for event in self._in_force(generation)
                    if event.payload["type"] == done.payload["type"] and event.key != done.key
                ]
                try:
                    told["image"] = self._means.image_with(left)
                except (*expected_failures(), *passing_failures()) as failure:
                    # What may be imported is checked in any case.
                    self._means.announce(f"the image keeps {done.key}: {failure}")
            return told, {}

        self._journal.once(
            "withdrawn",
            done.key,
            compute,
            given={
                "request_id": done.key,
                "type": done.payload["type"],
                "generation": generation,
            },
        )


def _heir(
    askers: Sequence[str], living: Sequence[Individual], everyone: Mapping[str, Individual]
) -> Individual | None:
    """Return the first of some agents that lives, or the fittest that descends from the first."""
    for asker in askers:
        line = _descendants(asker, everyone)
        heirs = [one for one in living if one.individual_id in line]
        if heirs:
            return max(heirs, key=lambda one: (one.individual_id == asker, fitness_or_least(one)))
    return None


def _made_by(done: Event) -> str | None:
    """Return whom an effect made, if it made somebody."""
    made: str | None = done.payload["details"].get("individual_id")
    return made


def _descendants(name: str | None, everyone: Mapping[str, Individual]) -> set[str]:
    """Return an individual and all that come of it."""
    found = {name} if name is not None else set()
    for one in sorted(everyone.values(), key=lambda one: (one.generation, one.slot)):
        if found & set(one.parent_ids):
            found.add(one.individual_id)
    return found
