"""What the harness itself asks people: when money or ideas run out, or something odd happened.

Reads: the journal and individuals. Never: asks; see people.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from darwin_exp.hitl.asked import RequestType, content_of
from darwin_exp.individual import Individual, Status
from darwin_exp.protocols import EditFailed, Event

NEARLY = 0.8  # of a cap
_MOST_WORDS = 300


@dataclass(frozen=True)
class Question:
    """What is to be asked, and why."""

    kind: RequestType
    reason: str
    content: str


def nearly_spent(
    events: Sequence[Event], caps: Mapping[str, float | None], hours: float
) -> list[Question]:
    """Return what is to be asked of caps that the run has nearly reached: for twice as much.

    Args:
        caps: by key, as in `max_hours` or `llm.max_usd`; None for no cap.
        hours: for which this process has worked at the run.
    """
    answers = [event.payload for event in events if event.kind == "llm_answered"]
    spent = {
        "max_hours": hours,
        "llm.max_usd": sum(answer["usd"] or 0.0 for answer in answers),
        "llm.max_tokens": sum(answer["tokens_in"] + answer["tokens_out"] for answer in answers),
        "llm.max_calls": len(answers),
    }
    return [
        Question(
            RequestType.BUDGET,
            f"{key}={cap:g} is nearly spent: {spent[key]:.3g} of it; the run stops there, and can "
            "be resumed",
            content_of({"key": key, "value": 2 * cap}),
        )
        for key, cap in caps.items()
        if cap is not None and spent[key] >= NEARLY * cap
    ]


def stuck(bests: Sequence[float], patience: int | None, best_id: str) -> list[Question]:
    """Return the question of a run whose best has not improved for some generations.

    Args:
        bests: highest fitness at the end of each generation.
        patience: after how many; None never asks.
    """
    if (
        patience is None
        or len(bests) <= patience
        or max(bests[-patience:]) > max(bests[:-patience])
    ):
        return []
    return [
        Question(
            RequestType.STUCK,
            f"no generation has improved on {best_id} for {patience} generations",
            f"{best_id} has been the best for {patience} generations (fitness {max(bests):.4g}). "
            "Guidance, a data set, or nothing? `guide` reaches the next prompts.\n",
        )
    ]


def quarantined(individual: Individual) -> list[Question]:
    """Return the question of an individual that was set apart."""
    if individual.status is not Status.QUARANTINED:
        return []
    name = individual.individual_id
    return [
        Question(
            RequestType.QUARANTINE,
            f"{name} was set apart and is not tried again",
            f"{name}: {individual.message[:_MOST_WORDS]}\n",
        )
    ]


def outside_the_tree(name: str, failure: EditFailed) -> list[Question]:
    """Return the question of a rewrite that would have written where no training code belongs."""
    told = str(failure).partition("\n")[0][:_MOST_WORDS]
    return [
        Question(
            RequestType.QUESTION,
            f"the rewrite for {name} wanted to write outside of what genomes may hold",
            f"{name}: {told}\n",
        )
    ]
