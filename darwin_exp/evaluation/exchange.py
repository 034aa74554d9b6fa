"""The scorer's side of the conversation with a model server.

Reads: answers of a sandboxed program that may say anything, at any pace, or nothing.
Writes: requests: tokens, never targets.
Never: reads more than an answer of the expected shape may hold, or waits beyond the deadline.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darwin_exp.evaluation.logits_server import (
    ANSWER,
    DONE,
    FAILED,
    LOGITS,
    MAX_ERROR_CHARACTERS,
    RATE,
    REQUEST,
    USES,
)
from darwin_exp.individual import Job, Reason, Status
from darwin_exp.protocols import Launch, Limits, Sandbox, Zone

MAX_JSON_BYTES = 8 << 20


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
        self, job: Job, artefacts: Path, sandbox: Sandbox, name: str, deadline: float
    ) -> None:
        """Start the program.

        Args:
            artefacts: folder that holds model.safetensors and model.json.
            name: for labels; tells the program nothing about its role.
            deadline: time.monotonic() after which no answer is waited for.

        Raises:
            InfrastructureFailure: it could not be started.
        """
        training = job.training
        self._vocab_size = job.data.vocab_size
        self._deadline = deadline
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

    def logits(self, batches: Iterable[NDArray[np.int32]]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits (B, T, V) of every batch of tokens (B, T), in order.

        The model works on the next batch while the caller looks at this one.

        Raises:
            Refused: SHAPE for any other shape, MODEL_CODE if the model fails, dies or is late.
        """
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
        self,
        tokens: NDArray[np.int32],
        steps: int,
        bfloat16: bool,
        compiled: bool,
        deadline: float,
    ) -> float:
        """Return how long so many forward and backward passes over tokens (B, T) took, from here.

        Raises:
            Refused: MODEL_CODE if they fail, the program dies or is late.
        """
        saved, self._deadline = self._deadline, min(self._deadline, deadline)
        try:
            before = time.monotonic()
            self._send(RATE, tokens, steps, bfloat16, compiled)
            self._receive_header()
            return time.monotonic() - before
        finally:
            self._deadline = saved

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
            message = "the model did not answer before the deadline of its scoring"
        else:
            last = self._program.log()[0].strip().splitlines()[-1:]
            message = f"the model's process ended while it was scored (status {ending.code})"
            message += "".join(f": {_printable(line)[:300]}" for line in last)
        return Refused(Status.REJECTED, Reason.MODEL_CODE, message)


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c == "\n")
