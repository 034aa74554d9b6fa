"""The scorer's side of the conversation with a model server.

Reads: answers of a sandboxed program that may say anything, at any pace, or nothing.
Writes: requests: tokens, never targets.
Never: reads more than an answer of the expected shape may hold, or waits beyond the deadline.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darwin_exp.evaluation.logits_server import (
    ANSWER,
    DONE,
    FAILED,
    LOAD,
    LOGITS,
    MAX_ERROR_CHARACTERS,
    RATE,
    REQUEST,
    USES,
)
from darwin_exp.individual import Job, Reason, Status
from darwin_exp.protocols import Launch, Limits, Sandbox, Zone

MAX_JSON_BYTES = 8 << 20
# Of what a model says about an error once it was sent held-out tokens, which it might quote.
MAX_LINE_CHARACTERS = 300


class Refused(Exception):
    """The candidate's own doing ended its scoring; never used for a failure of ours."""

    def __init__(self, status: Status, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class ModelServer:
    """A freshly started program that answers with the logits of one trained model.

    Use it as a context: the program is gone when the context ends.
    """

    def __init__(
        self,
        job: Job,
        artefacts: Path,
        sandbox: Sandbox,
        name: str,
        deadline: float,
        first_seconds: float = math.inf,
    ) -> None:
        """Start the program.

        Args:
            artefacts: folder that holds model.safetensors and model.json.
            name: for labels; tells the program nothing about its role.
            deadline: time.monotonic() after which no answer is waited for.
            first_seconds: how long the model may take to load and answer for the first time.

        Raises:
            InfrastructureFailure: it could not be started.
        """
        training = job.training
        self._vocab_size = job.data.vocab_size
        self._program = sandbox.start(
            Launch(
                name=name,
                zone=Zone.MODEL,
                genome=job.genome,
                inputs={
                    "model.safetensors": artefacts / "model.safetensors",
                    "model.json": artefacts / "model.json",
                },
                job={
                    "device": training.device,
                    "threads": training.threads,
                    "vocab_size": job.data.vocab_size,
                    "context_length": training.context_length,
                },
                limits=Limits(
                    startup_seconds=training.startup_seconds,
                    threads=training.threads,
                    memory_mb=training.memory_mb,
                    file_mb=training.file_mb,
                    max_processes=training.max_processes,
                    device=training.device,
                ),
            )
        )
        self.startup_seconds = self._program.startup_seconds
        self.ready_at = self._program.ready_at
        self._loaded = self._answered = False
        self._later_deadline = deadline
        self._deadline = min(deadline, time.monotonic() + first_seconds)
        self.lost = False  # it no longer answers

    def __enter__(self) -> ModelServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._program.close()

    @contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Wait for no answer within this context beyond an earlier deadline."""
        saved, self._deadline = self._deadline, min(self._deadline, deadline)
        try:
            yield
        finally:
            self._deadline = saved

    def logits(self, batches: Iterable[NDArray[np.int32]]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits (B, T, V) of every batch of tokens (B, T), in order.

        The model works on the next batch while the caller looks at this one.

        Raises:
            Refused: SHAPE for any other shape, MODEL_CODE if the model fails, dies or is late.
        """
        if not self._loaded:
            self._send(LOAD, np.empty((0, 0), dtype=np.int32))
            self._receive_header()
            self._loaded = True
        ahead: NDArray[np.int32] | None = None
        for batch in batches:
            if ahead is None:
                self._send(LOGITS, batch)
            else:
                content = self._receive_logits(ahead)
                self._send(LOGITS, batch)
                yield content
            ahead = batch
        if ahead is not None:
            yield self._receive_logits(ahead)

    def uses(self, tokens: NDArray[np.int32]) -> dict[str, Any]:
        """Return what the program says its forward pass multiplies: a claim, in JSON.

        Raises:
            Refused: MODEL_CODE if it fails, dies, is late or answers something else.
        """
        self._send(USES, tokens)
        size, _, _ = self._receive_header()
        if size > MAX_JSON_BYTES:
            raise self._nonsense()
        raw = self._receive(size)
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError):
            raise self._nonsense() from None
        if not isinstance(content, dict):
            raise self._nonsense()
        return content

    def seconds_for(
        self, tokens: NDArray[np.int32], steps: int, bfloat16: bool, compiled: bool
    ) -> tuple[float, NDArray[np.float32]]:
        """Return how long so many forward and backward passes over tokens (B, T) took, from here.

        Returns:
            Seconds, and what the program says that each row's loss was (B).

        Raises:
            Refused: MODEL_CODE if they fail, the program dies or is late.
        """
        before = time.monotonic()
        self._send(RATE, tokens, steps, bfloat16, compiled)
        if self._receive_header() != (len(tokens), 0, 0):
            raise self._nonsense()
        losses = np.frombuffer(self._receive(4 * len(tokens)), dtype="<f4")
        return time.monotonic() - before, losses

    # --- frames -------------------------------------------------------------------------------

    def _send(
        self,
        what: int,
        tokens: NDArray[np.int32],
        steps: int = 0,
        bfloat16: bool = False,
        compiled: bool = False,
    ) -> None:
        header = REQUEST.pack(what, *tokens.shape, steps, bfloat16, compiled)
        try:
            self._program.send(header + tokens.astype("<i4").tobytes(), self._deadline)
        except (TimeoutError, EOFError) as error:
            raise self._gone(error) from None

    def _receive(self, n_bytes: int) -> bytes:
        try:
            return self._program.receive(n_bytes, self._deadline)
        except (TimeoutError, EOFError) as error:
            raise self._gone(error) from None

    def _receive_header(self) -> tuple[int, int, int]:
        status, *sizes = ANSWER.unpack(self._receive(ANSWER.size))
        if status == DONE:
            return sizes[0], sizes[1], sizes[2]
        if status != FAILED:
            raise self._nonsense()
        text = self._receive(min(sizes[0], 4 * MAX_ERROR_CHARACTERS)).decode("utf-8", "replace")
        if self._loaded:
            text = _one_line(text)
        message = f"the saved model failed: {_printable(text).strip()}"
        raise Refused(Status.REJECTED, Reason.MODEL_CODE, message)

    def _receive_logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        expected = (*tokens.shape, self._vocab_size)
        shape = self._receive_header()
        if shape != expected:
            self.lost = True
            message = f"logits have shape {shape}, and {expected} are due"
            raise Refused(Status.REJECTED, Reason.SHAPE, message)
        raw = self._receive(4 * expected[0] * expected[1] * expected[2])
        if not self._answered:
            self._answered, self._deadline = True, self._later_deadline
        return np.frombuffer(raw, dtype="<f4").reshape(expected)

    def _nonsense(self) -> Refused:
        self.lost = True
        message = "model code answered in the harness's place, and not in its format"
        return Refused(Status.REJECTED, Reason.MODEL_CODE, message)

    def _gone(self, error: Exception) -> Refused:
        """Say how the program was lost: too slow, out of memory, or ended by itself."""
        self.lost = True
        if isinstance(error, EOFError):
            self._program.wait(1.0)  # it may have closed its channel a moment before it ended
        ending = self._program.close()
        if ending.out_of_memory:
            message = "the model went past its memory limit while it was scored"
            return Refused(Status.OUT_OF_MEMORY, Reason.MEMORY, message)
        if isinstance(error, TimeoutError):
            what = "" if self._answered else " its first request"
            message = f"the model did not answer{what} before the deadline of its scoring"
        else:
            message = f"the model's process ended while it was scored (status {ending.code})"
            if not self._loaded:  # what it prints later may quote held-out tokens
                last = self._program.log()[0].strip().splitlines()[-1:]
                message += "".join(f": {_one_line(line)}" for line in last)
        return Refused(Status.REJECTED, Reason.MODEL_CODE, message)


def _one_line(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:MAX_LINE_CHARACTERS]


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c == "\n")
