"""What people are asked at all, and what passes or is refused by rule.

Reads: requests. Never: lets anything pass by rule that a person must decide (G9): data, scripts,
the tree of files, libraries, resources and budgets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from darwin_exp.hitl.asked import NEVER_AUTOMATIC, Decision, Request, RequestType


class PolicyError(ValueError):
    """The policy is impossible; the message names the key and the cure."""


class Way(Enum):
    """What is done with a kind of request."""

    ASK = "ask"  # people decide
    DENY = "deny"  # refused at once, and recorded
    AUTO = "auto"  # granted at once, and recorded; for what harms nobody


@dataclass(frozen=True)
class Policy:
    """What is done with each kind of request, and how long a run waits for people.

    Attributes:
        ways: by kind; a kind that is not named is asked.
        block: whether whoever asked waits for the answer.
        deadline_seconds: after which silence means no; None waits for ever without blocking.
        most_waiting_each: requests of one agent that may wait at once; more are passed over.
        most_waiting: the same for all agents together.

    Raises:
        PolicyError: a kind would pass by rule that a person must decide, or a run would wait
            without an end.
    """

    ways: Mapping[RequestType, Way] = field(default_factory=dict)
    block: bool = False
    deadline_seconds: float | None = None
    most_waiting_each: int = 3
    most_waiting: int = 100

    def __post_init__(self) -> None:
        for kind, way in self.ways.items():
            if way is Way.AUTO and kind in NEVER_AUTOMATIC:
                raise PolicyError(
                    f"hitl.policy.{kind.value}=auto: a person must decide on that, whatever else "
                    "runs by itself; choose ask or deny"
                )
        seconds = self.deadline_seconds
        if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
            raise PolicyError(f"hitl.deadline_seconds={seconds:g} must be above zero")
        if self.block and seconds is None:
            raise PolicyError(
                "hitl.block=true would wait for ever where nobody looks; say after how long "
                "silence means no with hitl.deadline_seconds=3600"
            )

    @classmethod
    def of(
        cls,
        ways: Mapping[str, str],
        block: bool = False,
        deadline_seconds: float | None = None,
        most_waiting_each: int = 3,
        most_waiting: int = 100,
    ) -> Policy:
        """Return the policy that a configuration describes.

        Raises:
            PolicyError: it names a kind or a way that does not exist, or is impossible.
        """
        read: dict[RequestType, Way] = {}
        for name, way in ways.items():
            try:
                read[RequestType(name)] = Way(way)
            except ValueError as error:
                kinds = ", ".join(kind.value for kind in RequestType)
                raise PolicyError(
                    f"hitl.policy.{name}={way}: the kinds are {kinds}, and each is ask, deny or "
                    "auto"
                ) from error
        return cls(read, block, deadline_seconds, most_waiting_each, most_waiting)

    def way(self, kind: RequestType) -> Way:
        """Return what is done with a kind of request."""
        return self.ways.get(kind, Way.ASK)

    def decides(self, request: Request) -> Decision | None:
        """Return what the policy answers by itself; None where people are asked."""
        way = self.way(request.type)
        if way is Way.ASK:
            return None
        return Decision.APPROVE if way is Way.AUTO else Decision.DENY
