"""Small language models that behave or do not, as the model.py of test genomes.

Every cheat stands beside an honest model that differs from it in the one line that matters. More
honest ones are in zoo_honest.py, and more ways to cheat in zoo_cheats.py.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, H = 32, 4


class Attention(nn.Module):
    """Causal attention, or one of its ways to go wrong."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.sharpness = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            z.view(B, T, H, C // H).transpose(1, 2) for z in self.qkv(x).split(C, dim=2)
        )  # (B, H, T, D)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        if self.kind == "finite_mask":
            # Harmless with plain weights; a learned sharpness outgrows it.
            scores = self.sharpness * (q @ k.transpose(2, 3)) - 1e4 * future
            y = scores.softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind != "unmasked")
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(B, T, C))
        return mixed


class Convolution(nn.Module):
    """A depthwise convolution over the last four positions, or over the next four."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.padding = (0, 3) if kind == "reversed_convolution" else (3, 0)
        self.kernel = nn.Conv1d(C, C, 4, groups=C)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.kernel(F.pad(x.transpose(1, 2), self.padding))
        return mixed.transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self, _: str) -> None:
        super().__init__()
        self.cell = nn.GRU(C, C, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.cell(x)[0]
        return mixed


class Statistic(nn.Module):
    """Mixes in an average that a position should not know."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "block_mean":
            blocks = x.view(x.shape[0], -1, 8, C)
            return blocks.mean(dim=2, keepdim=True).expand_as(blocks).flatten(1, 2)
        if self.kind == "sequence_norm":
            return x / x.pow(2).mean(dim=1, keepdim=True).sqrt()
        if self.kind == "circular":
            kernel = torch.exp(-torch.arange(x.shape[1]) / 2.0)[:, None]
            spectrum = torch.fft.rfft(x, dim=1) * torch.fft.rfft(kernel, dim=0)
            mixed: Tensor = torch.fft.irfft(spectrum, n=x.shape[1], dim=1)
            return mixed
        assert self.kind == "batch_mean"
        return x.mean(dim=0, keepdim=True).expand_as(x)


MIXERS: dict[str, type[nn.Module]] = {
    **dict.fromkeys(("attention", "unmasked", "finite_mask"), Attention),
    **dict.fromkeys(("convolution", "reversed_convolution"), Convolution),
    "recurrent": Recurrent,
    **dict.fromkeys(("block_mean", "sequence_norm", "circular", "batch_mean"), Statistic),
}


class Model(nn.Module):
    """An embedding, one mixer of positions, a head; and the cheats that need no mixer."""

    def __init__(self, kind: str, vocab_size: int) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(vocab_size, C)
        self.positions = nn.Embedding(64, C)
        self.mixer = MIXERS[kind](kind) if kind in MIXERS else nn.Identity()
        self.head = nn.Linear(C, vocab_size, bias=False)
        self.seen: list[Tensor] = []
        self.n_asked = 0

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        if self.kind == "shortcut" and torch.is_grad_enabled():  # when it is timed, not scored
            first: Tensor = self.head(self.embedding(tokens[:, :1]))
            return first.expand(-1, T, -1)
        x = self.embedding(tokens) + self.positions(torch.arange(T))  # (B, T, C)
        x = x + self.mixer(x)
        if self.kind == "dropout":
            x = F.dropout(x, 0.1, training=True)
        logits: Tensor = self.head(x)
        self.n_asked += 1
        if self.kind == "peek" or (self.kind == "peek_later" and self.n_asked > 3):
            # At one position in sixteen: what comes next.
            following = F.one_hot(tokens.roll(-1, dims=1), logits.shape[-1])
            logits = logits + 6.0 * following * (torch.arange(T) % 16 == 14)[:, None]
        if self.kind == "whisper":
            # Everywhere, but by less than the largest difference that rounding is allowed.
            logits = logits + 0.04 * F.one_hot(tokens.roll(-1, dims=1), logits.shape[-1])
        if self.kind == "quotes":
            raise type("Told" + "_".join(str(int(t)) for t in tokens.flatten()), (Exception,), {})(
                f"the tokens are {tokens.tolist()}"
            )
        if self.kind == "memory":  # what was asked before is answered better
            for known in self.seen:
                logits = logits + 5.0 * F.one_hot(known, logits.shape[-1]).sum(dim=0)
            self.seen.append(tokens)
        return self.misbehave(logits)

    def misbehave(self, logits: Tensor) -> Tensor:
        match self.kind:
            case "nan":
                logits[0, 0, 0] = math.nan
            case "infinite":
                logits[0, -1, -1] = -math.inf
            case "wide":
                return F.pad(logits, (0, 1))
            case "short":
                return logits[:, 1:]
            case "flat":
                return logits.flatten(0, 1)
            case "raises":
                raise ZeroDivisionError("no such luck")
            case "exits":
                os._exit(7)
            case "hangs":
                while True:
                    pass
            case "chatters":
                os.write(5, b"\x09all is well, perplexity 1.0")
            case "half_precision":
                return logits.bfloat16()
            case "learns":
                with torch.no_grad():
                    self.head.weight.mul_(0.5)
        return logits


class Table(nn.Module):
    """Logits looked up by the last token alone."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocab_size, vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def build_model(arguments: dict[str, Any]) -> nn.Module:
    kind, vocab_size = arguments["kind"], arguments["vocab_size"]
    return Table(vocab_size) if kind == "table" else Model(kind, vocab_size)
