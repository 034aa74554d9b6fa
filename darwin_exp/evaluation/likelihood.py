"""Turns logits into what each target costs: the one softmax that a score is made of.

Reads: logits that a model server answered with, and targets that it never saw.
Writes: nothing.
Never: takes a probability from a candidate, whose numbers are normalised here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from darwin_exp.evaluation.exchange import Refused
from darwin_exp.individual import Reason, Status

CHUNK_ELEMENTS = 32_768  # float64 numbers of the softmax that fit the second-level cache


def negative_log_likelihood(
    logits: NDArray[np.float32], targets: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Return what each target costs in nats (B, T) under logits (B, T, V), in double precision.

    Raises:
        Refused: NONFINITE if a logit is infinite or not a number.
    """
    V = logits.shape[-1]
    rows, wanted = logits.reshape(-1, V), targets.ravel()
    nats = np.empty(len(rows))
    n = max(1, CHUNK_ELEMENTS // V)
    buffer, index = np.empty((n, V)), np.arange(n)
    for start in range(0, len(rows), n):
        chunk = rows[start : start + n]
        if not np.isfinite(chunk).all():
            raise Refused(
                Status.REJECTED, Reason.NONFINITE, "the model answered with logits not all finite"
            )
        x = buffer[: len(chunk)]
        np.subtract(chunk, chunk.max(axis=1, keepdims=True), out=x, dtype=np.float64)
        at_target = x[index[: len(chunk)], wanted[start : start + n]]
        np.exp(x, out=x)
        nats[start : start + n] = np.log(x.sum(axis=1)) - at_target
    return nats.reshape(targets.shape)
