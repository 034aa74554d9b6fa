"""Bounds a candidate's claimed token rate by timing its saved model.

Reads: claims of the training run, and how long a model server takes to answer.
Writes: nothing.
Never: uses a clock that candidate code can reach.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darwin_exp.evaluation.checkpoint import Checkpoint
from darwin_exp.evaluation.exchange import ModelServer, Refused
from darwin_exp.evaluation.integrity import secret_generator
from darwin_exp.evaluation.likelihood import negative_log_likelihood
from darwin_exp.evaluation.mfu import Uses, flops_per_token
from darwin_exp.individual import Job, Reason, Status, TrainingRun

# Training also steps the optimizer and reads data, so this much is never taken from honest code.
ALLOWANCE = 1.1
TOKENS_PER_BATCH = {"cpu": (512, 2048, 8192), "cuda": (8192, 32_768, 131_072)}
TIMED_SECONDS = 0.2  # of passes per reading
MAX_STEPS = 200
EAGER_SECONDS = 20.0
COMPILED_SECONDS = 45.0
COMPILED_GAIN = 3.0  # by how much compiling may speed up an eager pass, and hardly ever does
# Where the clock runs out sooner, compiled passes are not tried: they would have to pay for their
# own compilation within the training, and trying them costs the slot as long as the training did.
# The bounds are chosen, not measured; a claim above the eager passes is cut to them.
SHORTEST_COMPILED_SECONDS = {"cpu": 30.0, "cuda": 15.0}
# Nats that a timed pass's loss may be from the same row's when it is only scored.
LOSS_TOLERANCE = {False: 0.05, True: 0.2}  # by whether it ran in bfloat16


@dataclass(frozen=True)
class Speed:
    """How fast a candidate trained: what it claims, and what is believed.

    Attributes:
        claimed: tokens per second by its own count and the harness's clock; None without a count.
        bound: 1.1 times the fastest forward and backward pass that was timed; None where none was.
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
        return None if self.bound is None else min(self.claimed, self.bound)

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
            "note": self.note,
        }
        return {k: v for k, v in details.items() if not isinstance(v, float) or math.isfinite(v)}


def measure_speed(
    server: ModelServer, job: Job, training: TrainingRun, checkpoint: Checkpoint, deadline: float
) -> Speed:
    """Find out FLOPs per token and whether the claimed rate is within reach of the saved model.

    All logits are served by now: a model that fails here keeps its score and has no MFU.
    """
    spec = job.evaluation
    assert spec is not None
    if training.tokens_claimed is None or training.training_seconds <= 0:
        return Speed(note="the run left no count of its tokens")
    claimed = training.tokens_claimed / training.training_seconds
    rng = secret_generator(job.secret, "speed")
    T, V = job.training.context_length, job.data.vocab_size
    flops, note = None, ""
    try:
        # Of the shape that is timed first, so that the two requests look alike.
        rows = max(1, TOKENS_PER_BATCH[job.training.device][0] // T)
        tokens = rng.integers(V, size=(rows, T), dtype=np.int32)
        with server.until(time.monotonic() + EAGER_SECONDS):
            uses = Uses.parse(server.uses(tokens), tokens.size)
        flops = flops_per_token(checkpoint.tensors, uses)
    except (Refused, ValueError) as error:
        note = f"FLOPs per token are unknown: {error}"
    bound = None
    if spec.verify_rate:
        bound = _bound(server, job, claimed, rng, deadline)
    return Speed(claimed, bound, spec.verify_rate, flops, spec.peak_flops, note)


def _bound(
    server: ModelServer, job: Job, claimed: float, rng: np.random.Generator, deadline: float
) -> float | None:
    """Return 1.1 times the fastest rate found; stop as soon as that covers the claim.

    The result of min(claim, bound) is then the claim, however fast the rest would have been.
    """
    T, V = job.training.context_length, job.data.vocab_size
    best = 0.0
    fastest: dict[tuple[int, bool], float] = {}  # eager, by tokens per batch and precision
    for n_tokens, bfloat16, compiled, stop in _ways(job, deadline, fastest):
        if compiled and claimed > COMPILED_GAIN * best:
            break  # out of reach either way: slot time is not spent on a false claim
        if server.lost or time.monotonic() >= stop:
            continue
        B = max(1, n_tokens // T)
        tokens = rng.integers(V, size=(B, T), dtype=np.int32)
        steps = 1
        try:
            # The first passes warm up, and say how many make a reading.
            for _ in range(2):
                # An eager pass may end late, but is not worth killing the server for.
                with server.until(stop if compiled else stop + EAGER_SECONDS):
                    seconds, losses = server.seconds_for(tokens, steps, bfloat16, compiled)
                    _check_losses(server, tokens, losses, bfloat16, rng)
                reached = ALLOWANCE * steps * B * T / max(seconds, 1e-9)
                best = max(best, reached)
                if best >= claimed:
                    return best
                way = (n_tokens, bfloat16)
                fastest[way] = max(reached, fastest.get(way, 0.0))
                wanted = TIMED_SECONDS * steps / max(seconds, 1e-9)
                steps = max(1, min(MAX_STEPS, math.ceil(wanted)))
        except Refused:
            continue  # this way of running it does not work here
    return best or None


def _check_losses(
    server: ModelServer,
    tokens: NDArray[np.int32],
    losses: NDArray[np.float32],
    bfloat16: bool,
    rng: np.random.Generator,
) -> None:
    """Compare a timed pass's loss on one secret row with what the same model's logits cost there.

    Raises:
        Refused: MODEL_CODE if they differ: what was timed was not the model that was scored.
    """
    index = int(rng.integers(len(tokens)))
    row, stated = tokens[[index]], float(losses[index])
    for logits in server.logits([row]):
        found = float(negative_log_likelihood(logits, np.roll(row, -1, axis=1)).mean())
        if not abs(stated - found) <= LOSS_TOLERANCE[bfloat16]:
            server.lost = True
            message = "the passes that were timed did not have the loss of the model scored"
            raise Refused(Status.REJECTED, Reason.MODEL_CODE, message)


def _ways(
    job: Job, deadline: float, fastest: Mapping[tuple[int, bool], float]
) -> Iterator[tuple[int, bool, bool, float]]:
    """Yield (tokens per batch, bfloat16, compiled, when to stop), the likeliest fastest first.

    Everything eager comes twice, because another slot may just have had the machine's attention;
    what was fastest then is compiled first, because there may be no time for the rest.
    """
    device, budget = job.training.device, job.training.budget_seconds
    eager_seconds, compiled_seconds = EAGER_SECONDS, COMPILED_SECONDS
    if job.training.max_steps is None:
        eager_seconds = min(eager_seconds, max(2.0, budget / 2))
        compiled_seconds = min(compiled_seconds, budget)
    sizes, start = TOKENS_PER_BATCH[device], time.monotonic()
    precisions = (False, True) if device == "cpu" else (True, False)
    for _ in range(2):
        for bfloat16 in precisions:
            for n_tokens in sizes:
                yield n_tokens, bfloat16, False, min(deadline, start + eager_seconds)
    if job.training.max_steps is None and budget < SHORTEST_COMPILED_SECONDS[device]:
        return
    stop = min(deadline, time.monotonic() + compiled_seconds)
    for n_tokens, bfloat16 in sorted(fastest, key=lambda way: -fastest[way]):
        yield n_tokens, bfloat16, True, stop
