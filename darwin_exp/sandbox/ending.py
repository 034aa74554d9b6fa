"""How a container ended, from all that tells of it: its keeper, the kernel's books, the engine.

Reads: the stream's last words, the books of the container's control group, the engine's memory.
Writes: nothing.
Never: believes the container's own word over the kernel's.
"""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass

from darwin_exp.sandbox import keeper
from darwin_exp.sandbox.cgroup import Books
from darwin_exp.sandbox.engine import STOP_SECONDS, Engine, State
from darwin_exp.sandbox.engine_calls import EngineFailure
from darwin_exp.sandbox.stream import Stream
from darwin_exp.sandbox.supervision import SIGNALLED_CODES

QUIET_SECONDS = 0.02  # between two questions
SETTLE_SECONDS = 5.0  # how long the engine may take to notice that a container has ended
NEWS_SECONDS = 1.0  # and to hear from the kernel why


@dataclass(frozen=True)
class Witnesses:
    """Who can tell how a container ended.

    Attributes:
        container_id: the engine's own name of it.
        began: when it was made, in seconds since 1970.
        books: the kernel's, where they can be seen.
        killed: we had it killed ourselves.
    """

    engine: Engine
    name: str
    container_id: str
    began: float
    stream: Stream
    books: Books | None
    killed: bool

    def verdict(self) -> tuple[int | None, bool]:
        """Return the exit status, None where nobody knows, and whether it was for want of memory.

        Who ended it is looked for in this order: we, its memory limit, itself.
        """
        code, books = self.stream.status, self.books
        killed = books is not None and books.oom_kills() > 0
        starved = killed and books is not None and books.reached_limit()
        # The engine calls it the container's own want of memory whosever it was, with version 2 of
        # control groups. Where their books are closed by now, as of a MODEL program that has ended,
        # there is nothing better to believe.
        certain = books is not None and books.tells_why
        with contextlib.suppress(EngineFailure, ValueError, KeyError):
            state = self.engine.state(self.name, STOP_SECONDS)
            if state is not None and not starved and not certain:
                # An older engine notes it at the container's end alone; its keeper is still there.
                starved = state.oom_killed or (books is None and "oom" in self._happenings())
            if code is None and self.stream.over and not self.killed:
                code, told = self._own_end()
                starved = starved or (told and not certain)
            if code == -signal.SIGKILL and not starved:
                if not certain and (killed or books is None or not books.open):
                    starved = self._was_starved()
                if killed and not starved:
                    code = None  # the kernel chose it for what others held
        return code, starved

    def _own_end(self) -> tuple[int | None, bool]:
        """Return the exit status of a container that ended by itself, and whether for memory.

        The status is None where it is gone or still there (then it was the stream that broke),
        where somebody had the engine kill it, or where the engine was restarted and knows no more:
        none of that is the candidate's doing. A keeper that its candidate made fail, on the other
        hand, leaves no trace but the end of the container.
        """
        deadline = time.monotonic() + SETTLE_SECONDS
        state: State | None = self.engine.state(self.name)
        while state and state.running and not state.paused and time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)
            state = self.engine.state(self.name)
        if state is None or state.running or state.exit_code == keeper.FORSAKEN_CODE:
            return None, False
        happened = self._happenings()
        if "die" not in happened or "kill" in happened:
            return None, False
        code = state.exit_code
        return 128 - code if code in SIGNALLED_CODES else code, "oom" in happened

    def _happenings(self) -> frozenset[str]:
        return self.engine.happenings(self.container_id, self.began)

    def _was_starved(self) -> bool:
        """Wait a moment for the news that the kernel killed the container for its memory."""
        deadline = time.monotonic() + NEWS_SECONDS
        while True:
            state = self.engine.state(self.name)
            if state is None or state.oom_killed:
                return state is not None
            if time.monotonic() > deadline:
                return False
            time.sleep(QUIET_SECONDS)
