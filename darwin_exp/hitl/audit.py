"""The audit of an inbox: whether it still holds all that the run took from it.

Reads: entries and events. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from darwin_exp.hitl.inbox import Entry
from darwin_exp.protocols import Event


def lost(entries: Iterable[Entry], events: Iterable[Event]) -> list[int]:
    """Return the entries that the run's journal tells of and the inbox no longer holds so.

    A chain alone cannot tell that its end was cut off.

    Args:
        events: read before the entries, so that no entry can be missing for being newer.
    """
    held = {entry.sequence: entry.hash for entry in entries}
    return [
        taken["sequence"]
        for event in events
        if event.kind == "inbox"
        for taken in event.payload["entries"]
        if held.get(taken["sequence"]) != taken["hash"]
    ]
