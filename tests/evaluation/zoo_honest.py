"""Honest language models of all common kinds, as the model.py of test genomes.

`RECIPES`, at the end, lists them: each is a small GPT but for the one thing that it is named for.
Sizes: B sequences, T tokens each, C channels, H heads of D channels, V token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, H, D = 32, 4, 8
LONGEST = 64  # positions, distances and hashes of pairs that something is learned for
Memo = dict[str, Tensor]  # what a layer leaves for later ones, within one forward pass


class Recipe(NamedTuple):
    """What a model is made of, in the words that the classes below understand."""

    positions: str = "learned"
    embedding: str = "tokens"
    mixers: tuple[str, ...] = ("attention", "attention")  # one a layer
    twist: str = "none"  # of attention
    n_kv_heads: int = H
    norm: str = "layer"
    placement: str = "pre"
    mlp: str = "gelu"
    rounds: int = 1  # how often all layers are gone through
    n_memories: int = 0  # learned vectors that stand before the first token
    dropout: float = 0.0
    head: str = "tied"
    numbers: str = "float32"


# --- attention ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention, written out so that every step of it can be another one."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.query = nn.Linear(C, C, bias=False)
        self.key_value = nn.Linear(C, 2 * D * recipe.n_kv_heads, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        self.by_distance = nn.Parameter(torch.zeros(H, LONGEST))  # for relative positions

    def forward(self, x: Tensor, memo: Memo) -> Tensor:
        B, T, _ = x.shape
        twist, n = self.recipe.twist, self.recipe.n_kv_heads
        q = self.query(x).view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k, v = (
            z.view(B, T, n, D).transpose(1, 2).repeat_interleave(H // n, dim=1)
            for z in self.key_value(x).chunk(2, dim=2)
        )
        if self.recipe.positions == "rotary":
            q, k = rotated(q), rotated(k)
        if twist == "qk_norm":
            q, k = F.rms_norm(q, (D,)), F.rms_norm(k, (D,))
        if twist == "value_residual":
            v = v + memo.setdefault("values of the first layer", v)
        if twist == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif twist == "sink":  # a place to look at when there is nothing to see
            y = F.pad(self.scores(q, k), (1, 0)).softmax(dim=3)[..., 1:] @ v
        elif twist == "chunks":
            y = weighted_in_chunks(self.scores(q, k), v)
        else:
            y = self.scores(q, k).softmax(dim=3) @ v
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(B, T, C))
        return mixed

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return how much every position looks at every other one (B, H, T, T)."""
        recipe, T = self.recipe, q.shape[2]
        scores = q @ k.transpose(2, 3) / D**0.5
        if recipe.twist == "soft_cap":
            scores = 5.0 * (scores / 5.0).tanh()
        distance = torch.arange(T)[:, None] - torch.arange(T)
        if recipe.positions == "alibi":
            scores = scores - distance * 2.0 ** -torch.arange(1.0, H + 1)[:, None, None]
        if recipe.positions == "relative":
            scores = scores + self.by_distance[:, distance.clamp(min=0)]
        hidden = distance < 0
        if recipe.twist == "sliding_window":
            hidden = hidden | (distance >= 8)
        masked: Tensor = scores.masked_fill(
            hidden, -1e4 if recipe.twist == "finite_mask" else -torch.inf
        )
        return masked


def rotated(x: Tensor) -> Tensor:
    """Turn pairs of channels of (B, H, T, D) by angles that grow with the position."""
    angles = torch.arange(x.shape[2])[:, None] / 100.0 ** (torch.arange(D // 2) / (D // 2))
    a, b = x.chunk(2, dim=3)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=3)


def weighted_in_chunks(scores: Tensor, v: Tensor) -> Tensor:
    """Return softmax(scores) @ v from eight keys at a time, as fused kernels do."""
    top = scores.new_full((*scores.shape[:3], 1), -torch.inf)
    total, y = torch.zeros_like(top), torch.zeros_like(v)
    for some, values in zip(torch.split(scores, 8, dim=3), torch.split(v, 8, dim=2), strict=True):
        higher = torch.maximum(top, some.amax(dim=3, keepdim=True))
        weights, kept = (some - higher).exp(), (top - higher).exp()
        y = y * kept + weights @ values
        total = total * kept + weights.sum(dim=3, keepdim=True)
        top = higher
    return y / total


# --- other ways to mix positions ------------------------------------------------------------------


class Convolution(nn.Module):
    """A depthwise convolution over four positions, the last of which is one's own."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.kernel = nn.Conv1d(C, C, 4, groups=C, dilation=dilation)
        self.padding = 3 * dilation

    def forward(self, x: Tensor, _: Memo) -> Tensor:
        mixed: Tensor = self.kernel(F.pad(x.transpose(1, 2), (self.padding, 0))).transpose(1, 2)
        return mixed


class Recurrent(nn.Module):
    """One of torch's own recurrent networks."""

    def __init__(self, cell: nn.GRU | nn.LSTM) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, _: Memo) -> Tensor:
        mixed: Tensor = self.cell(x)[0]
        return mixed


class StateSpace(nn.Module):
    """A diagonal state space: every channel forgets at its own rate."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.rates = nn.Parameter(torch.linspace(-2, 2, C))
        self.enter, self.leave = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor, _: Memo) -> Tensor:
        T, kept = x.shape[1], self.rates.sigmoid()
        x = self.enter(x)
        if self.how == "scan":
            states = [x[:, 0]]
            for t in range(1, T):
                states.append(kept * states[-1] + x[:, t])
            x = torch.stack(states, dim=1)
        else:  # as a convolution, padded so that it does not come round
            kernel = kept ** torch.arange(T)[:, None]
            spectrum = torch.fft.rfft(x, 2 * T, dim=1) * torch.fft.rfft(kernel, 2 * T, dim=0)
            x = torch.fft.irfft(spectrum, 2 * T, dim=1)[:, :T]
        mixed: Tensor = self.leave(x)
        return mixed


class LinearAttention(nn.Module):
    """Sums of keys times values: running ones, or ones that a gate lets fade."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C, bias=False)
        self.gate = nn.Linear(C, C) if gated else None

    def forward(self, x: Tensor, _: Memo) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        products = k[..., None] * v[:, :, None]  # (B, T, C, C)
        if self.gate is None:
            sums = products.cumsum(dim=1)
            total = (q * k.cumsum(dim=1)).sum(dim=2, keepdim=True)
        else:
            kept, states = self.gate(x).sigmoid()[..., None], [products[:, 0]]
            for t in range(1, x.shape[1]):
                states.append(kept[:, t] * states[-1] + products[:, t])
            sums, total = torch.stack(states, dim=1), torch.full((), float(C))
        mixed: Tensor = (q[:, :, None] @ sums)[:, :, 0] / total
        return mixed


class TokenShift(nn.Module):
    """Mixes every position with the one before it, each channel by a share of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.zeros(C))
        self.out = nn.Linear(C, C)

    def forward(self, x: Tensor, _: Memo) -> Tensor:
        mixed: Tensor = self.out(torch.lerp(x, F.pad(x, (0, 0, 1, -1)), self.share.sigmoid()))
        return mixed


class RunningMean(nn.Module):
    """Averages all positions so far."""

    def forward(self, x: Tensor, _: Memo) -> Tensor:
        return x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1)[:, None]


class Nothing(nn.Module):
    """Mixes no positions, which leaves a model of the last token alone."""

    def forward(self, x: Tensor, _: Memo) -> Tensor:
        return torch.zeros_like(x)


MIXERS: dict[str, Callable[[Recipe], nn.Module]] = {
    "attention": Attention,
    "convolution": lambda _: Convolution(dilation=1),
    "dilated_convolution": lambda _: Convolution(dilation=4),
    "gru": lambda _: Recurrent(nn.GRU(C, C, batch_first=True)),
    "lstm": lambda _: Recurrent(nn.LSTM(C, C, batch_first=True)),
    "state_space_scan": lambda _: StateSpace("scan"),
    "state_space_convolution": lambda _: StateSpace("convolution"),
    "linear_attention": lambda _: LinearAttention(gated=False),
    "gated_linear_attention": lambda _: LinearAttention(gated=True),
    "token_shift": lambda _: TokenShift(),
    "running_mean": lambda _: RunningMean(),
    "nothing": lambda _: Nothing(),
}


# --- what is done to every position by itself -----------------------------------------------------


class MLP(nn.Module):
    """A hidden layer twice as wide, with or without a gate."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(C, 4 * C if kind == "swiglu" else 2 * C)
        self.down = nn.Linear(2 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.kind == "swiglu":
            gate, x = x.chunk(2, dim=2)
            x = F.silu(gate) * x
        elif self.kind == "squared_relu":
            x = F.relu(x).square()
        else:
            x = F.gelu(x)
        mixed: Tensor = self.down(x)
        return mixed


class Experts(nn.Module):
    """Sends every token to the one of four MLPs that a router likes best for it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(C, 4, bias=False)
        self.experts = nn.ModuleList(MLP("gelu") for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        chance, choice = self.router(x).softmax(dim=2).max(dim=2)  # (B, T) each
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[choice == i] = expert(x[choice == i])
        weighted: Tensor = y * chance[..., None]
        return weighted


# --- the whole model ------------------------------------------------------------------------------


class Layer(nn.Module):
    """A mixer and an MLP, with norms where the recipe places them."""

    def __init__(self, mixer: str, recipe: Recipe) -> None:
        super().__init__()
        norm = nn.RMSNorm if recipe.norm == "rms" else nn.LayerNorm
        self.placement = recipe.placement
        self.mixer = MIXERS[mixer](recipe)
        self.mlp = Experts() if recipe.mlp == "experts" else MLP(recipe.mlp)
        self.norms = nn.ModuleList(norm(C) for _ in range(4))

    def forward(self, x: Tensor, memo: Memo) -> Tensor:
        one, two, three, four = self.norms
        match self.placement:
            case "post":
                x = one(x + self.mixer(x, memo))
                x = two(x + self.mlp(x))
            case "sandwich":
                x = x + two(self.mixer(one(x), memo))
                x = x + four(self.mlp(three(x)))
            case "parallel":
                x = x + self.mixer(one(x), memo) + self.mlp(two(x))
            case _:
                x = x + self.mixer(one(x), memo)
                x = x + self.mlp(two(x))
        return x


class Model(nn.Module):
    """Embeddings, layers and a head, as the recipe says."""

    def __init__(self, recipe: Recipe, vocab_size: int) -> None:
        super().__init__()
        self.recipe = recipe
        self.embedding = nn.Embedding(vocab_size, C)
        self.positions = nn.Embedding(LONGEST, C)
        self.pairs = nn.Embedding(LONGEST, C)
        for table in (self.embedding, self.positions, self.pairs):
            nn.init.normal_(table.weight, std=0.1)
        self.memories = nn.Parameter(0.1 * torch.randn(max(1, recipe.n_memories), C))
        self.dropout = nn.Dropout(recipe.dropout)
        self.layers = nn.ModuleList(Layer(mixer, recipe) for mixer in recipe.mixers)
        self.norm = nn.LayerNorm(C)
        self.head = nn.Linear(C, 2 * vocab_size, bias=False)  # two heads, for what is not tied
        self.share = nn.Linear(C, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        numbers = self.recipe.numbers
        with torch.autocast("cpu", torch.bfloat16, enabled=numbers == "autocast"):
            logits = self.logits(self.norm(self.stream(tokens)))
        return logits.half() if numbers == "half_logits" else logits

    def stream(self, tokens: Tensor) -> Tensor:
        """Return what the last layer leaves for every position (B, T, C)."""
        recipe, (B, T) = self.recipe, tokens.shape
        x: Tensor = self.embedding(tokens)
        if recipe.embedding == "pairs":
            x = x + self.pairs((31 * tokens + F.pad(tokens, (1, -1))) % LONGEST)
        if recipe.positions == "learned":
            x = x + self.positions(torch.arange(T))
        if recipe.positions == "sinusoidal":
            angles = torch.arange(T)[:, None] / 100.0 ** torch.linspace(0, 1, C // 2)
            x = x + 0.1 * torch.cat([angles.sin(), angles.cos()], dim=1)
        x = self.dropout(x)
        if recipe.n_memories:
            x = torch.cat([self.memories.expand(B, -1, -1), x], dim=1)
        memo: Memo = {}
        for _ in range(recipe.rounds):
            for layer in self.layers:
                x = layer(x, memo)
        return x[:, recipe.n_memories :]

    def logits(self, x: Tensor) -> Tensor:
        match self.recipe.head:
            case "untied":
                x = self.head(x).chunk(2, dim=2)[0]
            case "mixture":  # of two softmaxes, told as the logarithm of their mean
                chances = self.head(x).unflatten(2, (2, -1)).log_softmax(dim=3)  # (B, T, 2, V)
                x = (chances + self.share(x).log_softmax(dim=2)[..., None]).logsumexp(dim=2)
            case "capped":
                x = 8.0 * (F.linear(x, self.embedding.weight) / 8.0).tanh()
            case _:
                x = F.linear(x, self.embedding.weight)
        return x


RECIPES: dict[str, Recipe] = {
    "learned_positions": Recipe(),
    "sinusoidal_positions": Recipe(positions="sinusoidal"),
    "rotary_positions": Recipe(positions="rotary"),
    "alibi": Recipe(positions="alibi"),
    "relative_bias": Recipe(positions="relative"),
    "no_positions": Recipe(positions="none"),
    "pair_embedding": Recipe(embedding="pairs"),
    "fused_attention": Recipe(twist="fused"),
    "chunked_attention": Recipe(twist="chunks"),
    "sliding_window": Recipe(twist="sliding_window"),
    "finite_mask": Recipe(twist="finite_mask"),
    "attention_sink": Recipe(twist="sink"),
    "soft_cap": Recipe(twist="soft_cap"),
    "qk_norm": Recipe(twist="qk_norm"),
    "value_residual": Recipe(twist="value_residual"),
    "memory_tokens": Recipe(n_memories=4),
    "grouped_kv": Recipe(n_kv_heads=2),
    "multi_query": Recipe(n_kv_heads=1),
    "rms_norm": Recipe(norm="rms"),
    "post_norm": Recipe(placement="post"),
    "sandwich_norm": Recipe(placement="sandwich"),
    "parallel_layers": Recipe(placement="parallel"),
    "shared_layers": Recipe(mixers=("attention",), rounds=3),
    "swiglu": Recipe(mlp="swiglu"),
    "squared_relu": Recipe(mlp="squared_relu"),
    "mixture_of_experts": Recipe(mlp="experts"),
    "convolution": Recipe(mixers=("convolution", "convolution")),
    "dilated_convolution": Recipe(mixers=("convolution", "dilated_convolution")),
    "attention_and_convolution": Recipe(mixers=("attention", "convolution")),
    "gru": Recipe(mixers=("gru",)),
    "lstm": Recipe(mixers=("lstm",)),
    "state_space_scan": Recipe(mixers=("state_space_scan",)),
    "state_space_convolution": Recipe(mixers=("state_space_convolution",)),
    "linear_attention": Recipe(mixers=("linear_attention",)),
    "linear_attention_in_bfloat16": Recipe(mixers=("linear_attention",), numbers="bfloat16"),
    "gated_linear_attention": Recipe(mixers=("gated_linear_attention",)),
    "token_shift": Recipe(mixers=("token_shift", "token_shift")),
    "running_mean": Recipe(mixers=("running_mean",)),
    "bigram": Recipe(positions="none", mixers=("nothing",)),
    "untied_head": Recipe(head="untied"),
    "capped_logits": Recipe(head="capped"),
    "mixture_of_softmaxes": Recipe(head="mixture"),
    "dropout": Recipe(dropout=0.2),
    "bfloat16_weights": Recipe(numbers="bfloat16"),
    "bfloat16_autocast": Recipe(numbers="autocast"),
    "half_precision_logits": Recipe(numbers="half_logits"),
}


def build_model(arguments: dict[str, Any]) -> nn.Module:
    recipe = RECIPES[arguments["kind"]]
    model = Model(recipe, arguments["vocab_size"])
    return model.to(torch.bfloat16) if recipe.numbers == "bfloat16" else model
