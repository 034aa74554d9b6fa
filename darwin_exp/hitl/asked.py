"""What is asked: the kinds of requests, where one can stand, and what may be answered.

A request is known by the run, its type and its exact content, so that the same thing asked for
twice is one request, and an approval of one content never covers another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from darwin_exp.hitl.inbox import Entry

HARNESS = "harness"  # who asks where no agent does
ID_DIGITS = 12


class RequestType(Enum):
    """What is asked for."""

    DATASET = "dataset"
    SCRIPT = "script"
    FILE_STRUCTURE = "file_structure"
    LIBRARY = "library"
    RESOURCES = "resources"
    QUESTION = "question"
    EDIT = "edit"  # a patch that waits for its review
    BUDGET = "budget"  # nearly spent; asks for more
    STUCK = "stuck"  # no gain for some generations
    QUARANTINE = "quarantine"


NEVER_AUTOMATIC = frozenset(
    {
        RequestType.DATASET,
        RequestType.SCRIPT,
        RequestType.FILE_STRUCTURE,
        RequestType.LIBRARY,
        RequestType.RESOURCES,
        RequestType.BUDGET,
    }
)


class State(Enum):
    """Where a request stands."""

    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    CHANGED = "changed"  # approved with another content
    ASKED_BACK = "asked_back"  # a person wants to know more; it still waits
    REVOKED = "revoked"
    EXPIRED = "expired"  # its deadline passed in silence, which means no


WAITING = frozenset({State.PENDING, State.ASKED_BACK})
GRANTED = frozenset({State.APPROVED, State.CHANGED})


class Decision(Enum):
    """What a person answers."""

    APPROVE = "approve"
    DENY = "deny"
    CHANGE = "change"
    ASK = "ask"


class Refused(Exception):
    """An entry does not count; the message says why."""


class NoSuchRequest(Exception):
    """No request, or more than one, has an id that begins so."""


def hash_of(content: str) -> str:
    """Return the SHA-256 of a content as text, as `sha256sum` gives it for a file of it."""
    # Half of a surrogate pair is no text, but must not stop whoever reads it.
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Request:
    """What somebody asks for; the same content asked for twice in a run is the same request.

    Attributes:
        content: exactly what an approval would approve.
        asked_by: the agent that asked first, or "harness".
        generation: in which it was asked.
        patch_of: of an edit, the individual that the patch would make.
    """

    run_id: str
    type: RequestType
    reason: str
    expected_effect: str
    content: str
    asked_by: str
    generation: int
    patch_of: str | None = None

    @property
    def request_id(self) -> str:
        """Twelve digits of the hash of run, type and content."""
        told = json.dumps([self.run_id, self.type.value, self.content])
        return hash_of(told)[:ID_DIGITS]

    @property
    def content_hash(self) -> str:
        """What an approval must name."""
        return hash_of(self.content)

    @property
    def nonce(self) -> str:
        """What an answer carries so that it counts in this run and for this request alone."""
        return f"{self.run_id}:{self.request_id}"

    @property
    def payload(self) -> dict[str, Any]:
        """Return the request as its "asked" entry tells it."""
        return {
            "request_id": self.request_id,
            "run_id": self.run_id,
            "type": self.type.value,
            "reason": self.reason,
            "expected_effect": self.expected_effect,
            "content": self.content,
            "content_hash": self.content_hash,
            "asked_by": self.asked_by,
            "generation": self.generation,
            "patch_of": self.patch_of,
        }

    @classmethod
    def of(cls, payload: Mapping[str, Any]) -> Request:
        """Return the request that an "asked" entry tells of.

        Raises:
            Refused: something is missing, or its id or hash is not that of its content.
        """
        names = ("run_id", "type", "reason", "expected_effect", "content", "asked_by")
        words = {name: text_of(payload, name) for name in names}
        try:
            kind = RequestType(words.pop("type"))
        except ValueError as error:
            raise Refused(f"nobody can ask for {payload['type']!r}") from error
        generation, patch_of = payload.get("generation"), payload.get("patch_of")
        if type(generation) is not int or not isinstance(patch_of, str | None):
            raise Refused("it does not say in which generation it was asked, or for whom")
        request = cls(**words, type=kind, generation=generation, patch_of=patch_of)
        told = (payload.get("request_id"), payload.get("content_hash"))
        if told != (request.request_id, request.content_hash):
            raise Refused("its id or its hash is not that of its content")
        return request


def content_of(value: Mapping[str, Any]) -> str:
    """Return a structured content as the text that people read and approve."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def edit_content(individual_id: str, parent_id: str, genome_id: str, patch: str) -> str:
    """Return what a review of an edit approves: the patch, and whose exact code it makes."""
    whose = f"individual {individual_id}\nparent {parent_id}\ngenome {genome_id}\n\n"
    return whose + (patch or "(no change)\n")


@dataclass(frozen=True)
class Standing:
    """A request, what became of it, and every entry that speaks of it.

    Attributes:
        granted_content: what may be carried out, as it was approved; None where nothing may.
    """

    request: Request
    state: State
    history: tuple[Entry, ...]
    granted_content: str | None = None

    @property
    def waits(self) -> bool:
        """Tell whether a person's answer is still wanted."""
        return self.state in WAITING

    @property
    def askers(self) -> tuple[str, ...]:
        """Return every agent that asked for it, in their order."""
        asked = (entry for entry in self.history if entry.kind == "asked")
        return tuple(dict.fromkeys(str(entry.payload["asked_by"]) for entry in asked))

    @property
    def asked_at(self) -> float:
        return self.history[0].written_at

    @property
    def last_words(self) -> Entry | None:
        """Return the last entry in which a person added a word of their own."""
        said = (e for e in reversed(self.history) if e.author.door != "run")
        return next((entry for entry in said if entry.payload.get("note")), None)

    @property
    def note(self) -> str:
        """Return the last thing that a person said of it, which may be nothing."""
        notes = [str(entry.payload.get("note") or "") for entry in self.history]
        return next((note for note in reversed(notes) if note), "")


def text_of(payload: Mapping[str, Any], name: str) -> str:
    """Return one text of a payload.

    Raises:
        Refused: it is missing or something else.
    """
    value = payload.get(name)
    if not isinstance(value, str):
        raise Refused(f'"{name}" is missing or is no text')
    return value
