"""Bounds a candidate's claimed token rate by timing its saved model.

Reads: claims of the training run, training text, and how long a model server takes to answer.
Writes: nothing.
Never: uses a clock that candidate code can reach.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darwin_exp.evaluation.checkpoint import Checkpoint
from darwin_exp.evaluation.exchange import ModelServer, Refused
from darwin_exp.evaluation.likelihood import negative_log_likelihood
from darwin_exp.evaluation.mfu import Uses, flops_per_token
from darwin_exp.evaluation.questions import secret_generator
from darwin_exp.evaluation.told import FreshRows, Tokens
from darwin_exp.individual import Job, Purpose, Reason, Status, TrainingRun

# Training also steps the optimizer and reads data, so this much is never taken from honest code.
ALLOWANCE = 1.1
# A claim a little above the bound may be honest, and was timed in a worse moment: it is cut to the
# bound. One that is further above is out of reach, and nothing of it is believed. Of 872 trainings
# of honest code on a busy machine, the highest claim was 1.23 times its bound.
OUT_OF_REACH = 1.25
# Nothing shows that a backward pass was made in full: a model may detach its logits, and gradients
# would be its own word. A forward pass it has to make, or its losses are wrong; and the backward
# pass takes at least as long, because each product of the forward pass makes two there, one for
# either factor's gradient. So a model trains at no more than half the rate of forward passes alone.
FORWARD_SHARE = 0.5
TOKENS_PER_BATCH = {"cpu": (512, 2048, 8192), "cuda": (8192, 32_768, 131_072)}
TIMED_SECONDS = 0.2  # of passes per reading
MAX_STEPS = 200
MAX_TIMED_TOKENS = 1 << 22  # of one request, all of its passes together
EAGER_SECONDS = 20.0
COMPILED_SECONDS = 45.0
COMPILED_GAIN = 3.0  # by how much compiling may speed up an eager pass, and hardly ever does
# Where the clock runs out sooner, compiled passes are not tried: they would have to pay for their
# own compilation within the training, and trying them costs the slot as long as the training did.
# The bounds are chosen, not measured; what compiled code does beyond eager passes is not believed.
SHORTEST_COMPILED_SECONDS = {"cpu": 30.0, "cuda": 15.0}
# Of each reading, so many secret rows have to cost what they did another server of the same model,
# which was never timed: a model that knows that it is can answer for less, but not as well. Who
# leaves out a third of the work is caught in four of five readings.
CHECKED_ROWS = 4
CHECKED_BYTES = 64 << 20  # of float32 logits in a reading; fewer rows where they would take more
READINGS = 24  # for which there are such rows
# A claim of two runs is the first of several timings, and others may be a little faster.
OF_SEVERAL = 1.1
# Nats that a token's loss may be from the scored one, on average over a row. Means of whole rows
# would be compared in vain: those a small stand-in for the model predicts about as closely.
LOSS_TOLERANCE = {False: 0.05, True: 0.2}  # by whether it ran in bfloat16


@dataclass(frozen=True)
class Speed:
    """How fast a candidate trained: what it claims, and what is believed.

    Attributes:
        claimed: tokens per second by its own count and the harness's clock; None without a count.
        bound: 1.1 times the fastest forward and backward pass that was timed, as far as forward
            passes alone allow it; None where none was timed.
        verified: whether the claim had to stay within the bound.
        flops: FLOPs per token by the rule of `mfu`; None where it could not be found out.
        peak_flops: FLOP/s that MFU is measured against.
        note: what could not be measured, and why.
    """

    claimed: float | None = None
    bound: float | None = None
    verified: bool = True
    flops: float | None = None
    peak_flops: float | None = None
    note: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        if self.claimed is None or not self.verified:
            return self.claimed
        return None if self.bound is None else believed_rate(self.claimed, self.bound)

    def rates(self) -> dict[str, float]:
        """Return tokens_per_second, mfu and mfu_claimed, as far as they are known."""
        rates: dict[str, float] = {}
        believed = self.tokens_per_second
        if believed is not None:
            rates["tokens_per_second"] = believed
        if self.flops is not None and self.peak_flops:
            if believed is not None:
                rates["mfu"] = believed * self.flops / self.peak_flops
            if self.claimed is not None:
                rates["mfu_claimed"] = self.claimed * self.flops / self.peak_flops
        return {name: rate for name, rate in rates.items() if math.isfinite(rate)}

    def details(self) -> dict[str, Any]:
        details = {
            "tokens_per_second_claimed": self.claimed,
            "tokens_per_second_bound": self.bound,
            "flops_per_token": self.flops,
            "peak_flops": self.peak_flops,
            "verified": self.verified,
            "note": self.note or self._why_unbelieved(),
        }
        return {k: v for k, v in details.items() if not isinstance(v, float) or math.isfinite(v)}

    def _why_unbelieved(self) -> str:
        if not self.verified or self.claimed is None or self.bound is None:
            return ""
        return why_unbelieved(self.claimed, self.bound) if self.tokens_per_second is None else ""


def believed_rate(claimed: float, bound: float) -> float | None:
    """Return what is believed of a claimed rate (tokens per second); None for nothing at all."""
    return None if claimed > OUT_OF_REACH * bound else min(claimed, bound)


def why_unbelieved(claimed: float, bound: float) -> str:
    """Say why nothing of a claimed rate is believed."""
    return (
        f"its count of tokens is not believed: it comes to {claimed:,.0f} tokens/s, and passes of "
        f"the saved model allow {bound / ALLOWANCE:,.0f}"
    )


@dataclass(frozen=True)
class Known:
    """Rows of text, and what each token costs by a server that is never timed.

    Attributes:
        rows: token ids (n, T).
        nats: what the token after each costs, after the last one the first (n, T).
    """

    rows: Tokens
    nats: NDArray[np.float64]


def known_rows(server: ModelServer, job: Job, batch_rows: int) -> Known:
    """Ask a server for what rows of text cost that will be hidden among those that are timed.

    Args:
        batch_rows: rows of each request, to look like all others.

    Raises:
        Refused: as `ModelServer.logits`.
    """
    T, spec = job.training.context_length, job.evaluation
    assert spec is not None
    n = READINGS * _rows_checked(T, job.data.vocab_size)
    fresh = FreshRows(job.data, T, secret_generator(job.secret, "known rows"))
    batches = [fresh.draw(batch_rows) for _ in range(-(-n // batch_rows))]
    nats = [
        negative_log_likelihood(logits, np.roll(rows, -1, axis=1))
        for rows, logits in zip(batches, server.logits(batches), strict=True)
    ]
    return Known(np.concatenate(batches), np.concatenate(nats))


def _rows_checked(length: int, vocab_size: int) -> int:
    return max(1, min(CHECKED_ROWS, CHECKED_BYTES // (4 * length * vocab_size)))


def measure_speed(
    server: ModelServer,
    job: Job,
    training: TrainingRun,
    checkpoint: Checkpoint,
    deadline: float,
    known: Known | None,
) -> Speed:
    """Find out FLOPs per token and whether the claimed rate is within reach of the saved model.

    All logits are served by now: a model that fails here keeps its score and has no MFU.

    Args:
        known: what another server said, without which no rate is verified.
    """
    spec = job.evaluation
    assert spec is not None
    tokens_before, seconds_before = spec.shorter_run or (0, 0.0)
    seconds = training.training_seconds - seconds_before
    if training.tokens_claimed is None or seconds <= 0:
        return Speed(note="the run left no count of its tokens")
    claimed = max(0, training.tokens_claimed - tokens_before) / seconds
    rng = secret_generator(job.secret, "speed")
    T = job.training.context_length
    fresh = FreshRows(job.data, T, rng)
    flops, note = None, ""
    try:
        # Of the shape that is timed first, so that the two requests look alike.
        tokens = fresh.draw(max(1, TOKENS_PER_BATCH[job.training.device][0] // T))
        with server.until(time.monotonic() + EAGER_SECONDS):
            uses = Uses.parse(server.uses(tokens), tokens.size)
        flops = flops_per_token(checkpoint.tensors, uses)
    except (Refused, ValueError) as error:
        note = f"FLOPs per token are unknown: {error}"
    bound = None
    if spec.verify_rate and known is not None:
        goal = claimed * (OF_SEVERAL if spec.shorter_run else 1.0)
        bound = _bound(_Stopwatch(server, fresh, known, rng, goal), job, deadline)
    return Speed(claimed, bound, spec.verify_rate, flops, spec.peak_flops, note)


class _Way(NamedTuple):
    """How a model is run while it is timed."""

    n_tokens: int  # per pass
    bfloat16: bool
    compiled: bool = False


def _bound(watch: _Stopwatch, job: Job, deadline: float) -> float | None:
    """Return the rate beyond which nothing is believed; stop as soon as that reaches the goal.

    Where the goal is the claim, that is what is believed then, however fast the rest would have
    been.
    """
    for way, stop in _ways(job, deadline, watch.eager):
        if way.compiled and COMPILED_GAIN * watch.bound < watch.goal:
            break  # out of reach either way: slot time is not spent on a false claim
        if watch.server.lost or watch.out_of_rows or time.monotonic() >= stop:
            continue
        try:
            watch.try_out(way, stop)
        except Refused:
            continue  # this way of running it does not work here
        if watch.bound >= watch.goal:
            break
    return watch.bound or None


class _Stopwatch:
    """Times passes of one saved model, each over rows that it never met before.

    Attributes:
        goal: tokens per second that need not be exceeded.
        eager: by way that needs no compiling, the fastest forward and backward passes (tokens/s).
    """

    def __init__(
        self,
        server: ModelServer,
        fresh: FreshRows,
        known: Known,
        rng: np.random.Generator,
        goal: float,
    ) -> None:
        self.server = server
        self.goal = goal
        self.eager: dict[_Way, float] = {}
        self._fresh = fresh
        self._known = known
        self._n_used = 0  # of the known rows
        self._rng = rng
        self._passes = 0.0  # the fastest forward and backward passes, in tokens per second
        self._forwards = 0.0  # the fastest forward passes alone

    @property
    def out_of_rows(self) -> bool:
        """Whether no further reading can be checked."""
        return self._n_used >= len(self._known.rows)

    @property
    def bound(self) -> float:
        """The most tokens per second that are believed after what was timed so far."""
        return ALLOWANCE * min(self._passes, FORWARD_SHARE * self._forwards)

    def try_out(self, way: _Way, stop: float) -> None:
        """Time a way of running the model; and forward passes, where they leave less than that.

        Raises:
            Refused: MODEL_CODE if it does not work, takes too long or was not the model scored.
        """
        for rate in self._readings(way, stop):
            self._passes = max(self._passes, rate)
            if not way.compiled:
                self.eager[way] = max(rate, self.eager.get(way, 0.0))
            if ALLOWANCE * self._passes >= self.goal:
                break
        # An eager forward pass mostly covers what compiled training does, and is there at once.
        for alone in dict.fromkeys((way._replace(compiled=False), way)):
            if self._forwards_suffice():
                return
            for rate in self._readings(alone, stop, backward=False):
                self._forwards = max(self._forwards, rate)
                if self._forwards_suffice():
                    return

    def _forwards_suffice(self) -> bool:
        wanted = min(ALLOWANCE * self._passes, self.goal)
        return ALLOWANCE * FORWARD_SHARE * self._forwards >= wanted

    def _readings(self, way: _Way, stop: float, backward: bool = True) -> Iterator[float]:
        """Yield tokens per second twice: the first passes warm up, and say how many to make."""
        n_tokens, bfloat16, compiled = way
        steps = 1
        for _ in range(2):
            rows = self._fresh.draw(steps * max(1, n_tokens // self._fresh.length))
            places, due = self._hide_known(rows)
            if not len(places):
                return
            # An eager pass may end late, but is not worth killing the server for.
            with self.server.until(stop if compiled else stop + EAGER_SECONDS):
                seconds, losses = self.server.seconds_for(rows, steps, bfloat16, compiled, backward)
            self._check_losses(losses[places], due, LOSS_TOLERANCE[bfloat16])
            seconds = max(seconds, 1e-9)
            yield rows.size / seconds
            wanted = math.ceil(TIMED_SECONDS * steps / seconds)
            steps = max(1, min(MAX_STEPS, MAX_TIMED_TOKENS * steps // rows.size, wanted))

    def _hide_known(self, rows: Tokens) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Put known rows, each but once, into secret places; return these and what is due there."""
        n = min(_rows_checked(self._fresh.length, self._fresh.vocab_size), len(rows))
        chosen = slice(self._n_used, self._n_used + n)
        due = self._known.nats[chosen]
        places = self._rng.choice(len(rows), size=len(due), replace=False)
        rows[places] = self._known.rows[chosen]
        self._n_used += n
        return places, due

    def _check_losses(
        self, found: NDArray[np.float32], due: NDArray[np.float64], tolerance: float
    ) -> None:
        """Compare what timed passes made of secret rows with what these cost (n, T).

        Whoever fails here is not timed again: with enough attempts, one would succeed.

        Raises:
            Refused: MODEL_CODE if they differ: what was timed was not the model that was scored.
        """
        difference = float(np.abs(found - due).mean(axis=1).max())
        if not difference <= tolerance:
            self.server.lost = True
            message = "the passes that were timed did not have the losses of the model scored"
            raise Refused(Status.REJECTED, Reason.MODEL_CODE, message)


def _ways(job: Job, deadline: float, eager: Mapping[_Way, float]) -> Iterator[tuple[_Way, float]]:
    """Yield ways to run a model and when to stop, the likeliest fastest first.

    Everything eager comes twice, because another slot may just have had the machine's attention;
    what was fastest then is compiled first, because there may be no time for the rest.
    """
    device, budget = job.training.device, job.training.budget_seconds
    eager_seconds, compiled_seconds = EAGER_SECONDS, COMPILED_SECONDS
    by_clock = job.training.max_steps is None or job.purpose is Purpose.RETIME
    if by_clock:
        eager_seconds = min(eager_seconds, max(2.0, budget / 2))
        compiled_seconds = min(compiled_seconds, budget)
    sizes, start = TOKENS_PER_BATCH[device], time.monotonic()
    precisions = (False, True) if device == "cpu" else (True, False)
    for _ in range(2):
        for bfloat16 in precisions:
            for n_tokens in sizes:
                yield _Way(n_tokens, bfloat16), min(deadline, start + eager_seconds)
    if by_clock and budget < SHORTEST_COMPILED_SECONDS[device]:
        return
    stop = min(deadline, time.monotonic() + compiled_seconds)
    for way in sorted(eager, key=lambda way: -eager[way]):
        yield way._replace(compiled=True), stop
