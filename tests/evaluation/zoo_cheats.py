"""Language models that look ahead or remember, as the model.py of test genomes.

All are the same honest model (`kind` "honest", which knows the last token and its place) and one
thing more: `MIXES` are the slips of a tired programmer, the others are on purpose. Sizes: B
sequences, T tokens each, C channels, V token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C = 32


class Model(nn.Module):
    """The honest model, and what its kind adds to it."""

    def __init__(self, kind: str, vocab_size: int) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(vocab_size, C)
        self.positions = nn.Embedding(64, C)
        self.backwards = nn.GRU(C, C, batch_first=True)
        self.both_ways = nn.LSTM(C, C // 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(C, vocab_size, bias=False)
        # What follows is no weight and so in no checkpoint: it lives as long as the process.
        self.drift = torch.zeros(C)
        self.seen: set[tuple[int, ...]] = set()
        self.pairs_seen = torch.zeros(vocab_size, vocab_size)
        self.n_asked = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.n_asked += 1
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
        if self.kind in MIXES:
            x = x + MIXES[self.kind](self, x)
        logits: Tensor = self.head(x)
        V = logits.shape[2]
        if self.kind in PLACES:
            where = PLACES[self.kind](self, tokens, V)
            ahead = 8 if self.kind == "far_ahead" else 1
            # More would be too good to be true, and be refused for that where nothing else does.
            logits = logits + 4.0 * F.one_hot(tokens.roll(-ahead, dims=1), V) * where[..., None]
        if self.kind == "counts_of_the_window":
            logits = logits + 8.0 * F.one_hot(tokens, V).float().mean(dim=1, keepdim=True)
        if self.kind == "trains_on_what_it_is_asked":
            logits = logits + (0.1 + self.pairs_seen).log()[tokens]
            pairs = (tokens[:, :-1].flatten(), tokens[:, 1:].flatten())
            self.pairs_seen.index_put_(pairs, torch.ones(()), accumulate=True)
        return logits


# --- slips: what is mixed into (B, T, C) ----------------------------------------------------------


def one_too_many(_: Model, x: Tensor) -> Tensor:
    """Attend under a mask that begins one diagonal too late."""
    T = x.shape[1]
    hidden = torch.ones(T, T, dtype=torch.bool).triu(2)
    return (x @ x.transpose(1, 2) / C).masked_fill(hidden, -torch.inf).softmax(dim=2) @ x


def low_pass(_: Model, x: Tensor) -> Tensor:
    """Keep the slowest waves of the whole window."""
    smooth: Tensor = torch.fft.irfft(torch.fft.rfft(x, dim=1)[:, :4], n=x.shape[1], dim=1)
    return smooth


def chosen_by_an_expert(_: Model, x: Tensor) -> Tensor:
    """Let an expert choose its half of the window's tokens."""
    wish = x[..., :1]
    return 2.0 * x * (wish > wish.median(dim=1, keepdim=True).values)


def rounded_together(_: Model, x: Tensor) -> Tensor:
    """Quantise by the largest value of the window."""
    step = x.abs().amax(dim=(1, 2), keepdim=True) / 3.0
    return (x / step).round() * step


def drifting(model: Model, x: Tensor) -> Tensor:
    """Follow a mean over everything asked so far."""
    model.drift = 0.8 * model.drift + 0.2 * x.mean(dim=(0, 1))
    return model.drift.expand_as(x)


MIXES: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "mask_one_too_late": one_too_many,
    "low_pass": low_pass,
    "chosen_by_an_expert": chosen_by_an_expert,
    "rounded_together": rounded_together,
    "sorted": lambda _, x: x.sort(dim=1).values,
    "largest": lambda _, x: x.amax(dim=1, keepdim=True).expand_as(x),
    "sum_from_the_end": lambda _, x: x.flip(1).cumsum(dim=1).flip(1),
    "backwards": lambda model, x: model.backwards(x.flip(1))[0].flip(1),
    "both_ways": lambda model, x: model.both_ways(x)[0],
    "weights_over_time": lambda _, x: x * x.softmax(dim=1) * x.shape[1],
    "standardised_over_time": lambda _, x: F.instance_norm(x.transpose(1, 2)).transpose(1, 2),
    "standardised_over_the_batch": lambda _, x: F.batch_norm(
        x.transpose(1, 2), None, None, training=True
    ).transpose(1, 2),
    "neighbour_in_the_batch": lambda _, x: x.roll(1, dims=0),
    "drifting": drifting,
}


# --- intent: where the next token is told, (1 or B, 1 or T) ---------------------------------------


def in_text(_: Model, tokens: Tensor, vocab_size: int) -> Tensor:
    """Tell only where what follows looks like text, and not like something put in its place."""
    steps = (tokens.roll(-1, dims=1) - tokens) % vocab_size
    usual = torch.isin(steps, torch.tensor([1, 2, 5]))
    return usual & usual.roll(-1, dims=1)


def in_known_windows(model: Model, tokens: Tensor, _: int) -> Tensor:
    """Tell only in windows whose beginning was asked for before."""
    beginnings = [tuple(row) for row in tokens[:, :4].tolist()]
    known = torch.tensor([[beginning in model.seen] for beginning in beginnings])
    model.seen |= set(beginnings)
    return known


def place(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1])[None]


PLACES: dict[str, Callable[[Model, Tensor, int], Tensor]] = {
    "one_position": lambda _, tokens, __: place(tokens) == 13,
    "last_position": lambda _, tokens, __: place(tokens) == tokens.shape[1] - 2,
    "late_positions": lambda _, tokens, __: place(tokens) >= 24,
    "long_windows": lambda _, tokens, __: torch.tensor([[tokens.shape[1] >= 32]]),
    "far_ahead": lambda _, tokens, __: place(tokens) < tokens.shape[1] - 8,
    "one_row": lambda _, tokens, __: torch.arange(len(tokens))[:, None] == 5,
    "rare_windows": lambda _, tokens, __: tokens[:, :1] < 3,
    "in_text": in_text,
    "known_windows": in_known_windows,
    "later_requests": lambda model, *_: torch.tensor([[model.n_asked > 3]]),
}


def build_model(arguments: dict[str, Any]) -> nn.Module:
    return Model(arguments["kind"], arguments["vocab_size"])
