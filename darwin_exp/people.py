"""People: what the run asks them, and what it hears of them.

Reads: the run's inbox, at points of the run's own choosing, and the journal of what was heard.
Writes: what is asked, into the inbox; what was heard and waited for, into the journal.
Never: takes silence for a yes, or hears something twice, earlier or later in a resumed run.

Any process may write the inbox at any time. What the run knows at a point is what it took until
then, so that a resumed run knows neither more nor less.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from darwin_exp.hitl.asked import HARNESS, Decision, Refused, Standing
from darwin_exp.hitl.inbox import (
    Author,
    Entry,
    EntryRefused,
    Inbox,
    InboxError,
    as_json,
    from_json,
)
from darwin_exp.hitl.notify import Notifier
from darwin_exp.hitl.policy import Policy
from darwin_exp.hitl.requests import (
    Board,
    Request,
    RequestType,
    answer,
    ask,
    check_budget,
    expire,
    fold,
)
from darwin_exp.hitl.wishes import key_and_value
from darwin_exp.journal import Journal
from darwin_exp.protocols import Event, Interrupted, Stopped
from darwin_exp.turns import Turns

SECONDS_BETWEEN_LOOKS = 0.5


class People:
    """Asks people, hears them, and waits for them where it must.

    Attributes:
        turns: which nobody holds who waits for a person.
        caps: as people have set them since.

    Args:
        inbox: None where a recorded run is replayed: nobody is asked then, or heard anew.
        told: "inbox" events that are known already, of this run or of the one that is replayed.
        stopping: set once the run is to end: nobody is waited for any longer.
        show_waiting: told how many requests wait for an answer, whenever that is looked up.
        caps: what the run may spend, by key; None for no cap.
    """

    def __init__(
        self,
        journal: Journal,
        run_id: str,
        turns: Turns,
        stopping: threading.Event,
        inbox: Inbox | None = None,
        policy: Policy | None = None,
        notifier: Notifier | None = None,
        announce: Callable[[str], None] = lambda _: None,
        show_waiting: Callable[[int], None] = lambda _: None,
        caps: Mapping[str, float | None] | None = None,
        told: Iterable[Event] = (),
    ) -> None:
        self.turns = turns
        self.caps = dict(caps or {})
        self._journal = journal
        self._run_id = run_id
        self._stopping = stopping
        self._inbox = inbox
        self._policy = policy or Policy()
        self._notifier = notifier or Notifier()
        self._announce = announce
        self._show_waiting = show_waiting
        self._hurry = threading.Event()
        self._mutex = threading.RLock()
        self._pausing = threading.Lock()
        self._taken: dict[int, Entry] = {}
        for event in told:
            self._keep(event)
        self._asked: set[tuple[str, str]] = set()  # (request, who) whose asking is settled
        self._passed_over: set[str] = set()
        self._read = [] if inbox is None else inbox.entries()
        self._board = fold(self._read, run_id)
        self._check_against_what_was_taken()
        # A wish to stop is for the process that runs when it is uttered.
        self._n_before = len(self._read)
        self._began = time.monotonic()
        self._configured = dict(self.caps)
        for event in journal.of_kind("budget"):
            self._heed_cap(event)
        for standing in self._board.waiting:  # a kill may have come before anybody was told
            self._notifier.tell(standing.request)

    @property
    def are_here(self) -> bool:
        """Tell whether there is anybody to ask; nobody is where a recorded run is replayed."""
        return self._inbox is not None

    @property
    def block(self) -> bool:
        """Tell whether whoever asks waits for the answer."""
        return self.are_here and self._policy.block

    # --- hearing ---------------------------------------------------------------------------------

    def take(self, point: str) -> Board:
        """Return what people have said until a point of the run: the same when it is resumed.

        Raises:
            InboxError: the inbox is damaged.
        """
        with self._mutex:
            event = self._journal.once("inbox", point, self._what_is_new)
            self._keep(event)
            upto = event.payload["upto"]
            board = self._fold(entry for n, entry in self._taken.items() if n <= upto)
            self._note_budgets(event, board)
        return board

    def hear_caps(self) -> None:
        """Hear of the caps that people have set while no process worked at the run.

        Whatever else they said is heard where the run has got to, not before.
        """
        new = self._read[max(self._taken, default=0) :]
        if any(entry.kind in ("budget", "answered") for entry in new):
            earlier = [e for e in self._journal.of_kind("inbox") if e.key.startswith("session-")]
            self.take(f"session-{len(earlier)}")

    def is_told_to_stop(self, board: Board) -> bool:
        """Tell whether somebody wants this process to stop after the generation."""
        return self.are_here and any(entry.sequence > self._n_before for entry in board.stops)

    def _what_is_new(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        if self._inbox is None:
            return {"upto": max(self._taken, default=0), "entries": []}, {}
        self._expire_overdue()
        self._live()
        known = max(self._taken, default=0)
        new = self._read[known:]
        return {"upto": len(self._read), "entries": [as_json(entry) for entry in new]}, {}

    def _keep(self, event: Event) -> None:
        for told in event.payload["entries"]:
            entry = from_json(told)
            self._taken[entry.sequence] = entry

    def _fold(self, entries: Iterable[Entry]) -> Board:
        in_order = sorted(entries, key=lambda entry: entry.sequence)
        return fold(in_order, None if self._inbox is None else self._run_id)

    def _live(self) -> Board:
        """Return what the inbox says at this moment, for whoever waits.

        Raises:
            InboxError: it is damaged, or no longer holds what was read before.
        """
        assert self._inbox is not None
        with self._mutex:
            if new := self._inbox.more(self._read):
                self._read += new
                self._board = fold(self._read, self._run_id)
                self._show_waiting(len(self._board.waiting))
            return self._board

    def _check_against_what_was_taken(self) -> None:
        """Make sure that the inbox still holds what the run went by.

        Raises:
            InboxError: it does not: what people said since would be read in the wrong place.
        """
        if self._inbox is None:
            return
        for n, entry in sorted(self._taken.items()):
            if n > len(self._read) or self._read[n - 1].hash != entry.hash:
                raise InboxError(
                    f"{self._inbox.path}: the run took entry {n}, which is gone or another one "
                    "now; restore the newest copy of the file"
                )

    def _note_budgets(self, event: Event, board: Board) -> None:
        """Write down the caps that an event's entries have changed: whoever spends hears of it."""
        refused = {refusal.entry.sequence for refusal in board.refused}
        for told in event.payload["entries"]:
            payload, sequence = told["payload"], told["sequence"]
            if sequence in refused:
                continue
            if told["kind"] == "budget":
                self._set_cap(sequence, payload["key"], payload["value"])
            elif told["kind"] == "answered":
                one = board.requests[payload["request_id"]]
                if one.request.type is RequestType.BUDGET and one.granted_content:
                    try:
                        key, value = key_and_value(RequestType.BUDGET, one.granted_content)
                        check_budget(key, value)
                    except Refused as refusal:
                        self._announce(f"request {one.request.request_id}: {refusal}")
                        continue
                    self._set_cap(sequence, key, value)

    def _set_cap(self, sequence: int, key: str, value: float) -> None:
        if self._journal.find("budget", str(sequence)) is None:  # or there may be a newer one
            told = {"key": key, "value": value, "configured": self._configured.get(key)}
            self._heed_cap(self._journal.once("budget", str(sequence), lambda: (told, {})))

    def _heed_cap(self, event: Event) -> None:
        key = event.payload["key"]
        if event.payload["configured"] == self._configured.get(key):  # or that is newer
            self.caps[key] = event.payload["value"]

    # --- asking ----------------------------------------------------------------------------------

    def ask(self, requests: Iterable[Request]) -> None:
        """Ask people, once however often the run is killed; waits where `hitl.block` says so.

        Raises:
            InboxError: the inbox is damaged, or its disk is full.
            Interrupted: the run is stopping.
        """
        if self._inbox is None:
            return
        for request in [request for request in requests if self._put(request)]:
            if self._policy.block:
                self.settled(request)

    def settled(self, request: Request) -> Standing:
        """Ask, wait without holding a turn, and return how the request stands when it is settled.

        Raises:
            InboxError: the inbox is damaged, or its disk is full.
            Interrupted: the run is stopping; nothing was decided.
        """
        self._put(request)
        with self.turns.given_up():
            while (standing := self._live().requests[request.request_id]).waits:
                self._expire_overdue()
                self._rest()
        return standing

    def request(
        self,
        kind: RequestType,
        reason: str,
        content: str,
        generation: int,
        asked_by: str = HARNESS,
        patch_of: str | None = None,
    ) -> Request:
        """Return a request of this run, to be asked."""
        return Request(self._run_id, kind, reason, "", content, asked_by, generation, patch_of)

    def requests_of(
        self, told: Iterable[Mapping[str, str]], asked_by: str, generation: int
    ) -> list[Request]:
        """Return what a rewrite's editor asks people for, as requests of this run."""
        return [
            self.request(
                RequestType(one["type"]),
                one["reason"],
                _canonical(one["content"]),
                generation,
                asked_by,
            )
            for one in told
        ]

    def _put(self, request: Request) -> bool:
        """Put a request to people, or to the policy; return whether it waits for an answer."""
        assert self._inbox is not None
        key = (request.request_id, request.asked_by)
        with self._mutex:
            if key in self._asked:
                return False
            before = self._live()
            known = request.request_id in before.requests
            if not known and self._has_asked_too_much(request, before):
                return False
            try:
                ask(self._inbox, request)
            except EntryRefused as refusal:
                self._announce(f"{request.asked_by} asks what cannot be kept: {refusal}")
                return False
            standing = self._live().requests[request.request_id]
            decision = self._policy.decides(request)
            if decision is not None and standing.waits:
                self._answer_by_rule(standing, decision)
                standing = self._live().requests[request.request_id]
            self._asked.add(key)
        if not known and standing.waits:
            self._notifier.tell(request)
            self._announce(
                f"{request.asked_by} asks people ({request.type.value.replace('_', ' ')}): python "
                f"-m darwin_exp.hitl --run {self._run_id} show {request.request_id}"
            )
        return standing.waits

    def _has_asked_too_much(self, request: Request, board: Board) -> bool:
        """Tell whether an agent, or all of them, have as much waiting as people can bear."""
        asker = request.asked_by
        if asker == HARNESS:
            return False
        waiting = [one for one in board.waiting if HARNESS not in one.askers]
        own = sum(asker in one.askers for one in waiting)
        if own < self._policy.most_waiting_each and len(waiting) < self._policy.most_waiting:
            return False
        if asker not in self._passed_over:
            self._passed_over.add(asker)
            self._announce(
                f"{asker} asks for more while {own} of its requests wait: passed over "
                "(hitl.most_waiting_each, hitl.most_waiting)"
            )
        return True

    def _answer_by_rule(self, standing: Standing, decision: Decision) -> None:
        assert self._inbox is not None
        way = self._policy.way(standing.request.type).value
        answer(
            self._inbox,
            standing,
            decision,
            Author(HARNESS, "run"),
            standing.request.content_hash if decision is Decision.APPROVE else "",
            note=f"hitl.policy.{standing.request.type.value}={way}",
        )

    def _expire_overdue(self) -> None:
        seconds = self._policy.deadline_seconds
        if seconds is None or self._inbox is None:
            return
        for standing in self._live().waiting:
            if time.time() - standing.asked_at > seconds:
                expire(self._inbox, standing.request.request_id)

    # --- pauses and the end ----------------------------------------------------------------------

    def wait_while_paused(self) -> None:
        """Return once nobody wants the run to pause.

        Raises:
            Interrupted: the run is stopping.
        """
        if self._inbox is None or not self._inbox.path.exists():
            return
        with self._pausing:
            if not self._live().is_paused:
                return
            self._announce(f"paused: python -m darwin_exp.hitl --run {self._run_id} resume")
            began = time.monotonic()
            while self._live().is_paused:
                self._rest()
            with self._mutex:
                n = len(self._journal.of_kind("paused"))
                self._journal.append("paused", str(n), {}, {"seconds": time.monotonic() - began})

    def stop_at_the_cap(self) -> None:
        """Raise Stopped once this process has worked for as many hours as it may."""
        hours = self.caps.get("max_hours")
        if hours is not None and self.hours > hours:
            raise Stopped(f"max_hours={hours:g} is reached")

    @property
    def hours(self) -> float:
        """For which this process has worked at the run, waiting and pauses included."""
        return (time.monotonic() - self._began) / 3600

    def _rest(self) -> None:
        self.stop_at_the_cap()
        if self._stopping.is_set() or self._hurry.wait(SECONDS_BETWEEN_LOOKS):
            raise Interrupted

    def stop_waiting(self) -> None:
        """Let nobody wait any longer: they end with Interrupted."""
        self._hurry.set()

    def close(self) -> None:
        """Deliver what people are still to be told of."""
        self._notifier.close()


def _canonical(content: str) -> str:
    """Return a content with JSON written in one way, so that the same wish is the same request."""
    try:
        text = json.dumps(json.loads(content), indent=2, sort_keys=True, ensure_ascii=False)
    except (ValueError, RecursionError):
        text = content.strip()
    # An escape may stand for half of a surrogate pair, which is no text.
    return text.encode("utf-8", "replace").decode() + "\n"
