"""Text that every genome was shown: what a model can be sent without telling it anything.

Reads: train.bin.
Writes: nothing.
Never: opens a held-out split.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from darwin_exp.individual import DataSpec
from darwin_exp.protocols import InfrastructureFailure

STRETCH_TOKENS = 1 << 22  # of the text, from which one model's rows are drawn

Tokens = NDArray[np.int32]


def told_text(data: DataSpec, at_most: int, rng: np.random.Generator | None = None) -> Tokens:
    """Return training text, of which no held-out window holds a part.

    Args:
        at_most: how many tokens.
        rng: draws where they begin; None takes the beginning of the text.

    Raises:
        InfrastructureFailure: the training text cannot be read.
    """
    path = data.folder / "train.bin"
    try:
        n_spare = path.stat().st_size // data.token_bytes - at_most
        start = 0 if rng is None or n_spare <= 0 else int(rng.integers(n_spare + 1))
        tokens = np.fromfile(
            path,
            dtype=f"<u{data.token_bytes}",
            count=at_most,
            offset=start * data.token_bytes,
        )
    except OSError as error:
        raise InfrastructureFailure(f"{path}: {error.strerror}") from error
    return tokens.astype(np.int32)


class FreshRows:
    """Draws rows of training text that a model was not asked about before.

    A row is made of two passages that meet at a random place: so even a short text has more rows
    than can be drawn twice by chance, and what is cached for one of them is of no use later.
    Tokens drawn one by one would be new as well, but nobody writes like that, and a model could
    tell them from what it is scored on.
    """

    def __init__(self, data: DataSpec, length: int, rng: np.random.Generator) -> None:
        """Read the text.

        Args:
            length: tokens per row. A text that is shorter makes rows of random tokens.
            rng: draws the rows; nobody else may know its seed.

        Raises:
            InfrastructureFailure: the training text cannot be read.
        """
        self._text = told_text(data, STRETCH_TOKENS, rng)
        self.length = length
        self.vocab_size = data.vocab_size
        self._rng = rng

    def draw(self, n: int) -> Tokens:
        """Return so many rows (n, length)."""
        rng, T = self._rng, self.length
        n_places = len(self._text) - T + 1
        if n_places < 1:
            return rng.integers(self.vocab_size, size=(n, T), dtype=np.int32)
        one, other = rng.integers(n_places, size=(2, n, 1))
        seams = rng.integers(T, size=(n, 1))
        within = np.arange(T)
        rows: Tokens = self._text[np.where(within < seams, one, other) + within]
        return rows
