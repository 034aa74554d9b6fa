"""The scorer's side of the conversation with a model server.

Reads: answers of a sandboxed program that may say anything, at any pace, or nothing.
Writes: requests: tokens, never targets.
Never: reads more than an answer of the expected shape may hold, or waits beyond the deadline.
"""

from __future__ import annotations

import builtins
import json
import math
import re
import statistics
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
    FORWARD,
    LOAD,
    LOGITS,
    MAX_ERROR_CHARACTERS,
    MISBEHAVIOURS,
    RATE,
    REQUEST,
    USES,
)
from darwin_exp.individual import Job, Reason, Status
from darwin_exp.protocols import InfrastructureFailure, Launch, Limits, Sandbox, Zone

MAX_JSON_BYTES = 8 << 20
MAX_LINE_CHARACTERS = 300  # of what a program printed last

# A model could go on training for as long as its first answer is waited for. Nothing tells that
# from loading, but loading is done once and every answer is work of the same kind: what the first
# one took beyond some later answers and this grace went into something else. The factor is for
# buffers, threads and kernels that are made when they are first needed, the grace for imports and
# for building the model; a GPU's libraries are loaded then, too, which takes seconds by itself.
FIRST_FACTOR = 5.0
FIRST_GRACE_SECONDS = {"cpu": 3.0, "cuda": 15.0}
LOADED_BYTES_PER_SECOND = 200e6  # a slow disk's

# Once a model was sent held-out tokens, it could spell them in any word of its own choice, which
# would reach the journal and whoever edits the next model. So no word is, and few numbers are.
_ERRORS_OF_TORCH = (
    "AcceleratorError",
    "BackendCompilerFailed",
    "CppCompileError",
    "InductorError",
    "InternalTorchDynamoError",
    "OutOfMemoryError",
    "TorchRuntimeError",
    "Unsupported",
    "_LinAlgError",
)
KNOWN_ERRORS = frozenset(_ERRORS_OF_TORCH) | {
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
}
_PLACE = re.compile(r"model\.py:[1-9][0-9]{0,4}")


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
            first_seconds: how long the model's first answer is waited for, loading included.

        Raises:
            InfrastructureFailure: it could not be started.
        """
        training = job.training
        n_bytes = (artefacts / "model.safetensors").stat().st_size
        self._grace = FIRST_GRACE_SECONDS[training.device] + n_bytes / LOADED_BYTES_PER_SECOND
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
                labels=job.labels,
            )
        )
        self.startup_seconds = self._program.startup_seconds
        self.ready_at = self._program.ready_at
        self._loaded = self._told = self._judged = False
        self._first_tokens: NDArray[np.int32] | None = None
        self._first_seconds = 0.0
        self._later_seconds: list[float] = []  # per token, of answers after the first one
        self._sent_at = self.ready_at
        self._later_deadline = deadline
        self._deadline = min(deadline, self.ready_at + first_seconds)
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

        The model works on the next batch while the caller looks at this one. Once all of the first
        batches are answered, the time that the first answer took is judged by the others.

        Raises:
            Refused: SHAPE for any other shape; MODEL_CODE if the model fails, dies or is late, or
                spent longer on its first answer than loading explains.
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
            self._judge_first_answer()

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
        backward: bool = True,
    ) -> tuple[float, NDArray[np.float32]]:
        """Return how long so many passes took, seen from here.

        Args:
            tokens: the rows of all passes (steps x B, T), those of the first one first.
            backward: whether a pass goes forward and back, or forward alone.

        Returns:
            Seconds, and what the program says that every token cost (steps x B, T).

        Raises:
            Refused: MODEL_CODE if they fail, the program dies or is late.
        """
        before = time.monotonic()
        self._send(RATE if backward else FORWARD, tokens, steps, bfloat16, compiled)
        if self._receive_header() != (*tokens.shape, 0):
            raise self._nonsense()
        losses = np.frombuffer(self._receive(4 * tokens.size), dtype="<f4")
        return time.monotonic() - before, losses.reshape(tokens.shape)

    def _judge_first_answer(self) -> None:
        """Compare the time that the first answer took with that of later ones, once.

        Raises:
            Refused: MODEL_CODE if loading does not explain the difference.
        """
        if self._judged or self._first_tokens is None:
            return
        self._judged = True
        if not self._later_seconds:  # there was one batch only: it is asked for again
            self._send(LOGITS, self._first_tokens)
            self._receive_logits(self._first_tokens)
        usual = statistics.median(self._later_seconds) * self._first_tokens.size
        if self._first_seconds > FIRST_FACTOR * usual + self._grace:
            self.lost = True
            message = (
                f"the model took {self._first_seconds:.1f} s to load and answer for the first "
                f"time, and {usual:.2f} s for such an answer later: while it is scored it must "
                "neither train nor compile itself"
            )
            raise Refused(Status.REJECTED, Reason.MODEL_CODE, message)

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
        self._told = self._told or tokens.size > 0
        if self._first_tokens is not None:  # the first answer's time begins when the model's does
            self._sent_at = time.monotonic()
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
        text = _without_own_words(text) if self._told else _printable(text).strip()
        message = f"the saved model failed: {text}"
        raise Refused(Status.REJECTED, Reason.MODEL_CODE, message)

    def _receive_logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        expected = (*tokens.shape, self._vocab_size)
        shape = self._receive_header()
        if shape != expected:
            self.lost = True
            sizes = (_size(n, due) for n, due in zip(shape, expected, strict=True))
            message = f"logits have shape ({', '.join(sizes)}), and {expected} are due"
            raise Refused(Status.REJECTED, Reason.SHAPE, message)
        raw = self._receive(4 * expected[0] * expected[1] * expected[2])
        seconds = time.monotonic() - self._sent_at
        if self._first_tokens is None:
            self._first_tokens, self._first_seconds = tokens, seconds
            self._deadline = self._later_deadline
        else:
            self._later_seconds.append(seconds / tokens.size)
        return np.frombuffer(raw, dtype="<f4").reshape(expected)

    def _nonsense(self) -> Refused:
        self.lost = True
        message = "model code answered in the harness's place, and not in its format"
        return Refused(Status.REJECTED, Reason.MODEL_CODE, message)

    def _gone(self, error: Exception) -> Refused:
        """Say how the program was lost: too slow, out of memory, or ended by itself.

        Raises:
            InfrastructureFailure: somebody else ended it.
        """
        self.lost = True
        # It may have closed its channel a moment before it ended.
        ended = isinstance(error, EOFError) and self._program.wait(1.0)
        ending = self._program.close()
        if ending.out_of_memory:
            message = "the model went past its memory limit while it was scored"
            return Refused(Status.OUT_OF_MEMORY, Reason.MEMORY, message)
        if ended and ending.code is None:
            raise InfrastructureFailure("the model's process was ended by neither itself nor us")
        if isinstance(error, TimeoutError):
            what = "" if self._first_tokens is not None else " its first request"
            message = f"the model did not answer{what} before the deadline of its scoring"
        else:
            message = f"the model's process ended while it was scored (status {ending.code})"
            if not self._told:  # what it prints later may quote held-out tokens
                last = self._program.log()[0].strip().splitlines()[-1:]
                message += "".join(f": {_one_line(line)}" for line in last)
        return Refused(Status.REJECTED, Reason.MODEL_CODE, message)


def _without_own_words(text: str) -> str:
    """Return what a line about an error says, as far as model code could not have chosen it."""
    if text in MISBEHAVIOURS:
        return text
    name, _, place = text.partition(" at ")
    name = name if name in KNOWN_ERRORS else "an error"
    return f"{name} at {place}" if _PLACE.fullmatch(place) else name


def _size(size: int, due: int) -> str:
    """Return a size that a model answered with, unless it is large enough to say something."""
    return str(size) if size <= 2 * due else f"over {2 * due}"


def _one_line(text: str) -> str:
    return "".join(c for c in text if c.isprintable())[:MAX_LINE_CHARACTERS]


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable() or c == "\n")
