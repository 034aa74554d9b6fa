"""Requests and answers: what the entries of an inbox amount to, and what counts as an approval.

Reads: entries, nothing else. `fold` is pure: the same entries give the same board.
Never: takes silence, a damaged answer or another run's answer for a yes.

An approval names the request, the run and the hash of exactly what was shown. A change approves
the new text that it carries, and only that. What does not count is kept in `Board.refused` with
the reason, so that an audit can tell it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from darwin_exp.hitl.asked import (
    GRANTED,
    HARNESS,
    NEVER_AUTOMATIC,
    WAITING,
    Decision,
    NoSuchRequest,
    Refused,
    Request,
    RequestType,
    Standing,
    State,
    content_of,
    edit_content,
    hash_of,
    text_of,
)
from darwin_exp.hitl.inbox import Author, Door, Entry, Inbox

__all__ = [  # with what is asked, so that a door needs one import
    "ALL", "BUDGETS", "GRANTED", "HARNESS", "NEVER_AUTOMATIC", "WAITING", "Board", "Decision",
    "Guidance", "NoSuchRequest", "Refusal", "Refused", "Request", "RequestType", "Standing",
    "State", "answer", "answer_payload", "ask", "check_answer", "check_budget",
    "check_revocation", "check_words", "content_of", "edit_content", "expire", "fold", "hash_of",
]  # fmt: skip

ALL = "all"  # whom a note is for that is for nobody in particular
MOST_TEXT = 4_000  # characters of a note or of guidance
WHOLE_NUMBERS = frozenset({"llm.max_tokens", "llm.max_calls"})
BUDGETS = frozenset({"max_hours", "llm.max_usd"}) | WHOLE_NUMBERS


@dataclass(frozen=True)
class Guidance:
    """A person's note to an agent, or to all of them."""

    to: str
    text: str
    entry: Entry


@dataclass(frozen=True)
class Refusal:
    """An entry that does not count, and why."""

    entry: Entry
    why: str


@dataclass(frozen=True)
class Board:
    """What an inbox amounts to.

    Attributes:
        requests: by their id, in the order in which they were asked.
        pins: individuals that are to live on, each with the entry that says so; a later veto
            takes a pin back, and the other way round.
        stops: every wish that the run should stop after a generation.
        budgets: the last value of every cap that a person has set.
        refused: what does not count.
    """

    requests: dict[str, Standing] = field(default_factory=dict)
    guidance: tuple[Guidance, ...] = ()
    pins: dict[str, Entry] = field(default_factory=dict)
    vetoes: dict[str, Entry] = field(default_factory=dict)
    is_paused: bool = False
    stops: tuple[Entry, ...] = ()
    budgets: dict[str, float] = field(default_factory=dict)
    refused: tuple[Refusal, ...] = ()

    @property
    def waiting(self) -> list[Standing]:
        """Return the requests that want an answer, the oldest first."""
        return [standing for standing in self.requests.values() if standing.waits]

    def find(self, prefix: str) -> Standing:
        """Return the request whose id begins so.

        Raises:
            NoSuchRequest: none does, or several do.
        """
        found = [one for name, one in self.requests.items() if prefix and name.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(one.request.request_id for one in found)
            raise NoSuchRequest(f"{prefix}: several requests begin so: {ids}; give more digits")
        raise NoSuchRequest(f"{prefix or 'an empty id'}: no such request; `list` shows them")

    def told_to(self, agents: Collection[str]) -> tuple[str, ...]:
        """Return people's own words to these agents, for their next prompt, oldest first."""
        told = [
            (note.entry.sequence, note.text)
            for note in self.guidance
            if note.to == ALL or note.to in agents
        ]
        for one in self.requests.values():
            if set(one.askers) & set(agents) and (words := one.last_words) is not None:
                kind = one.request.type.value.replace("_", " ")
                about = f"on request {one.request.request_id} ({kind})"
                told.append((words.sequence, f"{about}: {words.payload['note']}"))
        return tuple(text for _, text in sorted(told))

    def came_of(self, agents: Collection[str]) -> tuple[str, ...]:
        """Return where the requests of these agents stand, without a word of what they said."""
        return tuple(
            f"request {one.request.request_id} ({one.request.type.value}): "
            f"{one.state.value.replace('_', ' ')}"
            for one in self.requests.values()
            if set(one.askers) & set(agents)
        )


def fold(entries: Iterable[Entry], run_id: str | None = None) -> Board:
    """Return what the entries amount to, read in their order.

    Args:
        run_id: whose inbox it is; what was asked in another run does not count. None takes any.
    """
    folding = _Folding(run_id)
    for entry in entries:
        folding.take(entry)
    return folding.board()


class _Folding:
    """A board in the making."""

    def __init__(self, run_id: str | None) -> None:
        self._run_id = run_id
        self._requests: dict[str, Standing] = {}
        self._guidance: list[Guidance] = []
        self._pins: dict[str, Entry] = {}
        self._vetoes: dict[str, Entry] = {}
        self._is_paused = False
        self._stops: list[Entry] = []
        self._budgets: dict[str, float] = {}
        self._refused: list[Refusal] = []
        self._takers: dict[str, Callable[[Entry], None]] = {
            "asked": self._asked,
            "expired": self._expired,
            "answered": self._answered,
            "revoked": self._revoked,
            "guided": self._guided,
            "pinned": lambda entry: self._marked(entry, self._pins, self._vetoes),
            "vetoed": lambda entry: self._marked(entry, self._vetoes, self._pins),
            "paused": lambda entry: self._switched(entry, True),
            "resumed": lambda entry: self._switched(entry, False),
            "stop_after_generation": self._stopped,
            "budget": self._budgeted,
        }

    def take(self, entry: Entry) -> None:
        try:
            if entry.kind not in self._takers:
                raise Refused(f"nobody knows what {entry.kind!r} means")
            self._takers[entry.kind](entry)
        except Refused as refusal:
            self._refused.append(Refusal(entry, str(refusal)))

    def board(self) -> Board:
        return Board(
            self._requests,
            tuple(self._guidance),
            self._pins,
            self._vetoes,
            self._is_paused,
            tuple(self._stops),
            self._budgets,
            tuple(self._refused),
        )

    def _asked(self, entry: Entry) -> None:
        if entry.author.door != "run":
            raise Refused("only the run itself asks")
        request = Request.of(entry.payload)
        if self._run_id is not None and request.run_id != self._run_id:
            raise Refused(f"it was asked in another run, {request.run_id}")
        before = self._requests.get(request.request_id)
        if before is None:
            before = Standing(request, State.PENDING, ())
        elif before.request.content != request.content:
            raise Refused("another request bears its id; ask for something else")
        self._keep(before, entry)

    def _answered(self, entry: Entry) -> None:
        standing = self._standing(entry)
        check_answer(standing, entry.payload, entry.author.door)
        decision = Decision(entry.payload["decision"])
        if decision is Decision.APPROVE:
            content = standing.request.content
            self._keep(standing, entry, State.APPROVED, content)
        elif decision is Decision.CHANGE:
            self._keep(standing, entry, State.CHANGED, entry.payload["content"])
        else:
            state = State.DENIED if decision is Decision.DENY else State.ASKED_BACK
            self._keep(standing, entry, state)

    def _revoked(self, entry: Entry) -> None:
        _check_person(entry)
        standing = self._standing(entry)
        check_revocation(standing)
        self._keep(standing, entry, State.REVOKED)

    def _expired(self, entry: Entry) -> None:
        if entry.author.door != "run":
            raise Refused("only the run itself knows its deadlines")
        standing = self._standing(entry)
        # Whoever answered first is heard: a deadline that passed meanwhile changes nothing.
        state = State.EXPIRED if standing.waits else standing.state
        self._keep(standing, entry, state, standing.granted_content)

    def _standing(self, entry: Entry) -> Standing:
        standing = self._requests.get(text_of(entry.payload, "request_id"))
        if standing is None:
            raise Refused("there is no such request in this run")
        return standing

    def _keep(
        self, before: Standing, entry: Entry, state: State | None = None, granted: str | None = None
    ) -> None:
        history = (*before.history, entry)
        after = replace(before, history=history)
        if state is not None:
            after = replace(after, state=state, granted_content=granted)
        self._requests[before.request.request_id] = after

    def _guided(self, entry: Entry) -> None:
        _check_person(entry)
        to, text = text_of(entry.payload, "to"), text_of(entry.payload, "text")
        check_words(text)
        self._guidance.append(Guidance(to, text, entry))

    def _marked(self, entry: Entry, into: dict[str, Entry], out_of: dict[str, Entry]) -> None:
        _check_person(entry)
        name = text_of(entry.payload, "individual_id")
        out_of.pop(name, None)
        into[name] = entry

    def _switched(self, entry: Entry, is_paused: bool) -> None:
        _check_person(entry)
        self._is_paused = is_paused

    def _stopped(self, entry: Entry) -> None:
        _check_person(entry)
        self._stops.append(entry)

    def _budgeted(self, entry: Entry) -> None:
        _check_person(entry)
        key, value = text_of(entry.payload, "key"), entry.payload.get("value")
        check_budget(key, value)
        assert isinstance(value, int | float)
        self._budgets[key] = value


# --- what counts -----------------------------------------------------------------------------


def check_answer(standing: Standing, payload: Mapping[str, Any], door: Door) -> None:
    """Refuse an answer that does not count.

    Raises:
        Refused: it is none of the four, comes too late, is not bound to what was shown, was given
            in another run, or is the run's own where a person must decide.
    """
    request, state = standing.request, standing.state
    told = payload.get("decision")
    if not isinstance(told, str) or told not in {one.value for one in Decision}:
        raise Refused("it is no answer: approve, deny, change or ask")
    decision = Decision(told)
    approves = decision in (Decision.APPROVE, Decision.CHANGE)
    if state in GRANTED:
        raise Refused(f"the request was {state.value} already; it can be revoked")
    if state is State.REVOKED:
        raise Refused("the request was granted and revoked; it has to be asked anew")
    if not standing.waits and not approves:
        raise Refused(f"the request is {state.value} already")
    if not standing.waits and request.type is RequestType.EDIT:
        raise Refused(f"the rewrite is {state.value}, and its slot has gone on without it")
    by_rule = decision is Decision.APPROVE and request.type not in NEVER_AUTOMATIC
    if door == "run" and decision is not Decision.DENY and not by_rule:
        raise Refused(f"only a person may decide on a request for {request.type.value}")
    note = payload.get("note") or ""
    if not isinstance(note, str) or len(note) > MOST_TEXT:
        raise Refused(f"a note is a text of at most {MOST_TEXT:,} characters")
    if decision is Decision.ASK and not note.strip():
        raise Refused("a question back needs words")
    if approves:
        _check_binding(request, decision, payload)


def _check_binding(request: Request, decision: Decision, payload: Mapping[str, Any]) -> None:
    """Refuse an approval that is not bound to this run, this request and this content."""
    if payload.get("nonce") != request.nonce:
        raise Refused("the approval was given in another run or for another request")
    agreed = request.content
    if decision is Decision.CHANGE:
        agreed = text_of(payload, "content")
        if not agreed.strip():
            raise Refused("a change to nothing approves nothing")
    elif payload.get("content") not in (None, request.content):
        raise Refused("an approval with another content is a change, and has to say so")
    if payload.get("content_hash") != hash_of(agreed):
        raise Refused("the hash is not that of what would be approved; look at it again")


def check_revocation(standing: Standing) -> None:
    """Refuse to revoke what was never granted.

    Raises:
        Refused: the request is not approved.
    """
    if standing.state not in GRANTED:
        raise Refused(f"the request is {standing.state.value}: there is nothing to revoke")
    if standing.request.type is RequestType.BUDGET:
        raise Refused("a cap is not revoked but set anew: `budget key=value`")


def check_budget(key: str, value: object) -> None:
    """Refuse a cap that no run has, or a value that is none.

    Raises:
        Refused: the key is unknown, or the value no number above zero.
    """
    if key not in BUDGETS:
        raise Refused(f"{key} is no budget; there are {', '.join(sorted(BUDGETS))}")
    whole = type(value) is int
    if not whole and not (type(value) is float and math.isfinite(value)):
        raise Refused(f"{key} takes a number, not {value!r}")
    if key in WHOLE_NUMBERS and not whole:
        raise Refused(f"{key} takes a whole number, not {value!r}")
    assert isinstance(value, int | float)
    if value <= 0:
        raise Refused(f"{key} must be above zero, not {value!r}")


def check_words(text: str) -> None:
    """Refuse guidance that says nothing or too much.

    Raises:
        Refused: it is empty, or longer than a prompt has room for.
    """
    if not text.strip() or len(text) > MOST_TEXT:
        raise Refused(f"guidance has 1 to {MOST_TEXT:,} characters")


def _check_person(entry: Entry) -> None:
    if entry.author.door == "run":
        raise Refused("only a person may say so, by the terminal or the web page")


# --- writing ---------------------------------------------------------------------------------


def ask(inbox: Inbox, request: Request) -> Entry:
    """Ask, unless this agent has asked for this already, also before a crash.

    Raises:
        InboxError: it could not be written.
    """

    def is_it(entry: Entry) -> bool:
        who = (entry.payload.get("request_id"), entry.payload.get("asked_by"))
        return entry.kind == "asked" and who == (request.request_id, request.asked_by)

    return inbox.append_unless(is_it, "asked", request.payload, Author(request.asked_by, "run"))


def answer_payload(
    standing: Standing,
    decision: Decision,
    content_hash: str = "",
    content: str | None = None,
    note: str = "",
) -> dict[str, Any]:
    """Return what an "answered" entry says; see `answer`."""
    return {
        "request_id": standing.request.request_id,
        "decision": decision.value,
        "content_hash": content_hash,
        "content": content,
        "note": note,
        "nonce": standing.request.nonce,
    }


def answer(
    inbox: Inbox,
    standing: Standing,
    decision: Decision,
    author: Author,
    content_hash: str = "",
    content: str | None = None,
    note: str = "",
) -> Entry:
    """Write a person's answer, if it would count.

    Args:
        content_hash: of exactly what the person saw and agreed to: of the request's content, or
            for a change of the new one. Not needed to deny or to ask back.
        content: what a change approves instead.

    Raises:
        Refused: it would not count, perhaps because somebody else has answered meanwhile.
        InboxError: it could not be written.
    """
    payload = answer_payload(standing, decision, content_hash, content, note)
    check_answer(standing, payload, author.door)
    request = standing.request

    def still_counts(before: Sequence[Entry]) -> None:
        now = fold(before, request.run_id).requests.get(request.request_id, standing)
        check_answer(now, payload, author.door)

    return inbox.append("answered", payload, author, still_counts)


def expire(inbox: Inbox, request_id: str) -> Entry:
    """Write that a deadline passed; whether it passed in silence the fold decides.

    Raises:
        InboxError: it could not be written.
    """

    def is_it(entry: Entry) -> bool:
        return entry.kind == "expired" and entry.payload.get("request_id") == request_id

    return inbox.append_unless(is_it, "expired", {"request_id": request_id}, Author(HARNESS, "run"))
