"""Genomes with built-in edits, trained for real, and what must hold of the models they leave."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from darwin_exp.individual import Genome
from darwin_exp.mutation import EDITS
from darwin_exp.mutation.builtin import CodeEdit, SettingsEdit
from tests.tiny_run import ROOT, T, lay_out, rebuilt, run_train

V = 31  # token ids
TINY = {"n_layers": 2, "n_heads": 2, "width": 32, "batch_size": 4}
STRUCTURAL = [name for name, edit in EDITS.items() if isinstance(edit, CodeEdit)]
ON_SETTINGS = [name for name, edit in EDITS.items() if isinstance(edit, SettingsEdit)]
ON_TRAINING = [name for name in STRUCTURAL if EDITS[name].file == "train.py"]
# Whichever comes second is refused, though they are about different things.
EXCLUSIVE = [{"adamw_eps", "lion"}, {"sandwich_norm", "zero_projections"}]
# Pairs of edits that a child may hold: about different things, in both orders.
PAIRS = [
    (one, other)
    for one in EDITS
    for other in EDITS
    if EDITS[one].about != EDITS[other].about and {one, other} not in EXCLUSIVE
]


def with_settings(genome: Genome, **changed: Any) -> Genome:
    """Return a genome with the default trainer's settings, some of them changed."""
    recipe = yaml.safe_load((ROOT / "conf/trainer/baseline.yaml").read_text())["settings"]
    return genome.with_files({"settings.json": json.dumps({**recipe, **changed}, indent=2) + "\n"})


@lru_cache(maxsize=1)
def base_genome() -> Genome:
    """Return the base genome with settings for a tiny model."""
    return with_settings(Genome.from_folder(ROOT / "trainer_base"), **TINY)


@lru_cache(maxsize=1024)
def edited(genome: Genome, name: str, seed: int = 0) -> Genome:
    """Return a genome after one edit, with parameters drawn from a seed.

    Raises:
        EditFailed: it does not fit.
    """
    edit = EDITS[name]
    return edit.apply(genome, edit.draw(genome, Random(seed)))


def one_of_each_kind(names: Iterable[str], rng: Random) -> list[str]:
    """Return names in random order that one genome can hold, one about each thing at most."""
    by_topic = groupby(sorted(names, key=lambda n: EDITS[n].about), lambda n: EDITS[n].about)
    chosen = [rng.choice(list(group)) for _, group in by_topic]
    drawn = rng.sample(chosen, len(chosen))
    return [n for i, n in enumerate(drawn) if not any({n, m} in EXCLUSIVE for m in drawn[:i])]


def lay_out_genome(genome: Genome, folder: Path, vocab_size: int = V, **job: Any) -> Path:
    """Lay out a run on a pattern that a model can learn, so that its training shows in the loss."""
    return lay_out(genome, folder, np.arange(4_000) * 7 % V, vocab_size, **job)


def train(genome: Genome, folder: Path, **job: Any) -> dict[str, Any]:
    """Train a genome in this process and return the names that its train.py defined."""
    return run_train(lay_out_genome(genome, folder, **job))


def trained(genome: Genome, folder: Path, **job: Any) -> nn.Module:
    """Train a genome in this process and return the model that it left, rebuilt from its files."""
    train(genome, folder, **job)
    return rebuilt(folder)


def assert_parses(genome: Genome) -> None:
    """Check that every file of a genome is what its name says."""
    for path, text in genome.files:
        ast.parse(text) if path.endswith(".py") else json.loads(text)


def assert_keeps_the_contract(model: nn.Module, folder: Path) -> None:
    """Check a rebuilt model's logits: shape, finite, causal, the same alone, in a batch, anew."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(V, (3, T), generator=generator)
    with torch.inference_mode():
        logits = model(tokens)
        assert logits.shape == (3, T, V)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        for cut in (1, 2, 7, T - 1):
            prefix = model(tokens[:, :cut])
            assert prefix.shape == (3, cut, V)
            torch.testing.assert_close(prefix, logits[:, :cut], atol=2e-4, rtol=1e-3)
            other = tokens.clone()
            other[:, cut:] = (other[:, cut:] + 1) % V
            torch.testing.assert_close(model(other)[:, :cut], logits[:, :cut], atol=2e-4, rtol=1e-3)
            assert not torch.equal(model(other)[:, cut:], logits[:, cut:])
        alone = torch.cat([model(row[None]) for row in tokens])
        torch.testing.assert_close(alone, logits, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(rebuilt(folder)(tokens), logits, atol=0, rtol=0)
    # The harness times a backward pass after serving: nothing may be left in inference mode.
    model(tokens).sum().backward()
