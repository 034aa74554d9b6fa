"""Every random decision of a run, derived from its seed and its place, never from a live generator.

A resumed run therefore draws what the uninterrupted one would have drawn. Secrets of the scorer
come from the run's integrity key instead, which no genome is told.
"""

from __future__ import annotations

import hashlib
import hmac
from random import Random


def stream(seed: int, *place: str | int) -> Random:
    """Return the generator of one decision, such as stream(seed, "edit", generation, slot)."""
    return Random(_digest(str(seed).encode(), place))


def training_seed(seed: int, *place: str | int) -> int:
    """Return the seed (31 bits) that the harness gives to one training."""
    return int.from_bytes(_digest(str(seed).encode(), ("training", *place))[:4], "big") >> 1


def secret(key: bytes, *purpose: str | int) -> bytes:
    """Return 32 secret bytes for one purpose of the scorer."""
    return _digest(key, purpose)


def _digest(key: bytes, place: tuple[str | int, ...]) -> bytes:
    return hmac.new(key, "/".join(map(str, place)).encode(), hashlib.sha256).digest()
