"""Patience with an endpoint: how long to pause before another try, and who tries in an outage."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

from darwin_exp.llm.failures import Failure
from darwin_exp.protocols import Interrupted

# The system's own randomness: pauses must not draw from the run's seeds.
_chance = random.SystemRandom()
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Patience:
    """How often and how long to wait for an endpoint that fails.

    Attributes:
        max_retries: tries after a failed one, before the failure counts as an outage.
        first_seconds: upper end of the first pause; every further one may be twice as long.
        longest_seconds: of a pause between two tries, unless the server asks for more.
        outage_seconds: first pause of an outage, which then doubles.
        longest_outage_seconds: of a pause in an outage; a server that asks for more before the
            next try is in one.
    """

    max_retries: int = 5
    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    outage_seconds: float = 30.0
    longest_outage_seconds: float = 600.0

    def has_room_for(self, n_failed: int, failure: Failure) -> bool:
        """Tell whether another try follows so many failed ones before that counts as an outage."""
        asked_for = failure.retry_after_seconds or 0.0
        return n_failed <= self.max_retries and asked_for <= self.longest_outage_seconds

    def pause(self, n_failed: int, failure: Failure) -> float:
        """Return the seconds before another try: full jitter, on top of what the server asks for.

        Source: M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015.
        """
        doubled = self.first_seconds * 2.0 ** min(n_failed - 1, 60)
        jitter = _chance.uniform(0.0, min(self.longest_seconds, doubled))
        return (failure.retry_after_seconds or 0.0) + jitter

    def outage_pause(self, n_pauses: int, failure: Failure) -> float:
        """Return the seconds before an endpoint that is down is tried again."""
        doubled = self.outage_seconds * 2.0 ** min(n_pauses, 60)
        return max(failure.retry_after_seconds or 0.0, min(self.longest_outage_seconds, doubled))


class Endpoint:
    """What all slots know of one endpoint: whether it is down, and then only one of them tries."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._up = threading.Event()
        self._up.set()

    def wait_while_down(self, stopping: threading.Event) -> None:
        """Return once the endpoint is not known to be down.

        Raises:
            Interrupted: the run is stopping.
        """
        while not self._up.wait(_LOOK_SECONDS):
            if stopping.is_set():
                raise Interrupted

    def begin_outage(self) -> bool:
        """Take note that it is down; return whether the caller is the one to go on trying."""
        with self._mutex:
            was_up = self._up.is_set()
            self._up.clear()
            return was_up

    def end_outage(self) -> None:
        """Let the others try again: it answered, or who tried has given up."""
        self._up.set()
