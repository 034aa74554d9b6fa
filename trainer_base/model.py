"""A small GPT: learned positions, pre-norm blocks, causal attention, a tied output head.

The architecture is GPT-2's, with the liberties that nanoGPT made popular (no biases, dropout
off). `build_model` is what the harness calls to serve the trained weights, so it must rebuild
from `model.json` alone whatever `train.py` trained.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Karpathy's
nanoGPT for the published small-scale settings.

Sizes in the comments: B sequences, T tokens each, C channels (`width`), H heads of D = C / H
channels, V token ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- 1. What a model is made from ---------------------------------------------------------------


@dataclass(frozen=True)
class GPTConfig:
    """Everything that `GPT` is built from; `model.json` holds exactly these fields.

    Attributes:
        vocab_size: number of token ids, V.
        context_length: longest sequence that the model can read, in tokens.
        n_layers: transformer blocks.
        n_heads: attention heads a block, H; divides `width`.
        width: channels of the residual stream, C.
        dropout: share of activations dropped in training, 0 to 1.
        bias: whether linear layers and norms have biases.
        tied_head: whether the output head is the token embedding.
    """

    vocab_size: int
    context_length: int
    n_layers: int
    n_heads: int
    width: int
    dropout: float
    bias: bool
    tied_head: bool


# --- 2. The parts of a block --------------------------------------------------------------------


class LayerNorm(nn.Module):
    """Normalises every position over its channels; unlike torch's, the bias is optional."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)  # (B, T, C)


class CausalSelfAttention(nn.Module):
    """Lets every position read from itself and from the positions before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.projection = nn.Linear(config.width, config.width, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.query_key_value(x).split(C, dim=2)  # three of (B, T, C)
        q = q.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        update: Tensor = self.residual_dropout(self.projection(y))  # (B, T, C)
        return update


class MLP(nn.Module):
    """Transforms every position by itself, through a hidden layer four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.projection = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.expand(x))  # (B, T, 4C)
        update: Tensor = self.residual_dropout(self.projection(x))  # (B, T, C)
        return update


class Block(nn.Module):
    """Adds attention, then the MLP, to the residual stream; each reads a normalised copy of it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.width, config.bias)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = LayerNorm(config.width, config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))  # (B, T, C)
        updated: Tensor = x + self.mlp(self.mlp_norm(x))  # (B, T, C)
        return updated


# --- 3. The whole model -------------------------------------------------------------------------


class GPT(nn.Module):
    """Turns token ids into logits for the token that follows each of them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = LayerNorm(config.width, config.bias)
        if not config.tied_head:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.initialise_weights()

    def initialise_weights(self) -> None:
        """Draw small normal weights, smaller still where a branch joins the residual stream.

        Every block adds to the stream twice; scaling those projections keeps its variance from
        growing with depth.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("projection.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layers))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (B, T, V) for tokens (B, T) int64, with T at most `context_length`."""
        _, T = tokens.shape
        positions = torch.arange(T, device=tokens.device)  # (T,)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, C)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        if self.config.tied_head:
            # The embedding's own tensor, so that a checkpoint holds it once.
            return F.linear(x, self.token_embedding.weight)  # (B, T, V)
        logits: Tensor = self.head(x)  # (B, T, V)
        return logits


def build_model(arguments: Mapping[str, Any]) -> nn.Module:
    """Build a freshly initialised model from the content of `model.json`."""
    return GPT(GPTConfig(**arguments))
