"""The end of containers: killed at once, and what is left of them removed beside other things.

Of a container that was killed nothing runs any more, and the memory that it held is free. What is
left are the engine's records of it and of its volume. To remove these takes longer than to kill it,
and is done while the next container is started, which waits for it before it is used.

Reads: what the engine says.
Writes: nothing; ends and removes containers, removes volumes.
Never: leaves unattended what it began: who owns it waits for it in the end. If the harness is
killed meanwhile, the next one finds what is left by its labels; see reaping.py.
"""

from __future__ import annotations

import threading
import time

from darwin_exp.sandbox.engine import STOP_SECONDS, Engine
from darwin_exp.sandbox.engine_calls import EngineFailure

NOTHING_TO_KILL = (404, 409)  # there is no such container, or it does not run


class Removals:
    """The removals that one sandbox has begun."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._begun: list[_Removal] = []
        # Reentrant: a sandbox that is dropped may be cleaned up anywhere, and so in here.
        self._mutex = threading.RLock()

    def remove(self, name: str, seconds: float) -> None:
        """End all that runs in a container, and begin to remove it and the volume of its name.

        Where it is not certain to have ended, nothing is put off.

        Args:
            seconds: how long each part may take, ending it and removing it.

        Raises:
            EngineFailure: it cannot be ended, or nobody can tell.
        """
        deadline = time.monotonic() + seconds
        if not self._end(name):
            self._engine.purge(name, deadline - time.monotonic())
            return
        removal = _Removal(self._engine, name, seconds)
        with self._mutex:
            self._begun.append(removal)
        removal.begin()

    def finish(self) -> None:
        """Wait until all that was begun is verified to be gone, or has failed.

        Raises:
            EngineFailure: some of it is still there, or nobody can tell; that is said once.
        """
        with self._mutex:
            begun = list(self._begun)
        for removal in begun:
            removal.wait()
        with self._mutex:
            self._begun = [each for each in self._begun if each not in begun]
        for removal in begun:
            if removal.failure is not None:
                raise removal.failure

    def _end(self, name: str) -> bool:
        """Kill every process of a container; return whether it is certain that none is left."""
        try:
            self._engine.kill(name)
        except EngineFailure as failure:
            if failure.status not in NOTHING_TO_KILL:
                return False
        # An engine of Docker's answers when it has seen the end, others need not: so it is asked.
        # The first process of a container ends after all others.
        try:
            state = self._engine.state(name, STOP_SECONDS)
        except EngineFailure:
            return False
        return state is None or not state.running


class _Removal:
    """One removal, in a thread of its own."""

    def __init__(self, engine: Engine, name: str, seconds: float) -> None:
        self.failure: EngineFailure | None = None
        self._engine, self._name, self._seconds = engine, name, seconds
        self._thread = threading.Thread(target=self._purge, name=f"remove-{name}", daemon=True)

    def begin(self) -> None:
        try:
            self._thread.start()
        except RuntimeError:  # there can be no more threads, as when the interpreter ends
            self._purge()

    def wait(self) -> None:
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _purge(self) -> None:
        try:
            self._engine.purge(self._name, self._seconds)
        except EngineFailure as failure:
            self.failure = failure
        except Exception as defect:  # whoever waits must hear of it all the same
            self.failure = EngineFailure(f"{type(defect).__name__}: {defect}")
