"""A small genome, agents, lessons and surroundings for tests of what language models are told."""

from __future__ import annotations

from typing import Any

from darwin_exp.individual import Edit, Genome, Individual, Status
from darwin_exp.mutation import Surroundings
from darwin_exp.protocols import EditRequest, Lesson

MODEL = '''\
"""A model."""

from torch import nn
import torch.nn.functional as F


class MLP(nn.Module):
    """Two layers."""

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


# What the harness calls.
def build_model(arguments):
    return MLP()
'''
TRAIN = """\
import json
import sys

WARM_UP = 0.05
RATE = 0.004


def learning_rate(progress):
    if progress < WARM_UP:
        return RATE * progress / WARM_UP
    return RATE


for step in range(100):
    rate = learning_rate(step / 100)
    print(step, rate)
"""
SETTINGS = '{\n  "learning_rate": 0.004,\n  "width": 128\n}\n'
GENOME = Genome.of({"model.py": MODEL, "train.py": TRAIN, "settings.json": SETTINGS})

CONTRACT = "# What a genome owes the harness\n\nKeep `build_model`.\n\n## The job file\n\nJSON.\n"
ABOUT = Surroundings(
    device="cpu, 1 thread, a processor",
    budget_seconds=60.0,
    max_steps=None,
    memory_mb=4096,
    context_length=64,
    vocab_size=80,
    train_tokens=1_003_854,
    fitness="validation perplexity after training, the lower the better.",
    contract=CONTRACT,
)


def changed(genome: Genome, *replacements: tuple[str, str, str]) -> Genome:
    """Return a genome with texts replaced: (file, what stands there once, what shall)."""
    for file, old, new in replacements:
        assert genome.as_dict[file].count(old) == 1
        genome = genome.with_files({file: genome.as_dict[file].replace(old, new)})
    return genome


def agent(name: str, genome: Genome = GENOME, perplexity: float = 5.0, **more: Any) -> Individual:
    """Return a measured agent."""
    known: dict[str, Any] = {
        "metrics": {"val_perplexity": perplexity, "val_bpb": perplexity / 2},
        "rates": {"mfu": 0.25, "tokens_per_second": 21_000.0},
        "fitness": -perplexity / 10,
    }
    return Individual(name, generation=0, slot=0, genome=genome, **{**known, **more})


BASE = agent("g00-i00", perplexity=6.0)
PARENT = agent("g01-i02", changed(GENOME, ("settings.json", "0.004", "0.006")), 5.0)
EDITOR = agent("g01-i03", changed(GENOME, ("model.py", "F.gelu", "F.relu")), 5.5)
MATE = agent("g01-i01", changed(GENOME, ("train.py", "WARM_UP = 0.05", "WARM_UP = 0.1")), 5.2)


def request(**more: Any) -> EditRequest:
    """Return a request of the editor for the parent."""
    known: dict[str, Any] = {
        "parent": PARENT,
        "editor": EDITOR,
        "ordinal": 6,
        "individual_id": "g02-i03",
        "generation": 2,
        "base": BASE,
        "noise": 0.02,
    }
    return EditRequest(**{**known, **more})


def lesson(name: str, summary: str, file: str = "train.py", **more: Any) -> Lesson:
    """Return a lesson on one rewrite by a language model."""
    known: dict[str, Any] = {
        "generation": 1,
        "parent_id": "g00-i00",
        "editor_id": "g00-i00",
        "edits": (Edit("a-model", file, summary, {"exchange": f"{name}/0/0"}),),
        "status": Status.OK,
    }
    return Lesson(individual_id=name, summary=summary, **{**known, **more})


LESSONS = (
    lesson("g00-i01", "RMS norm instead of layer norm", "model.py", effect=0.031, z_score=1.1),
    lesson(
        "g00-i02",
        "fused optimizer in bfloat16",
        status=Status.CRASHED,
        error="exception: RuntimeError: expected scalar type Float",
    ),
    lesson(
        "g01-i03",
        "ReLU in the MLP",
        "model.py",
        editor_id="g01-i03",
        effect=-0.05,
        z_score=-1.8,
        expected_effect="faster steps",
    ),
    lesson(
        "g01-i02",
        "learning rate 0.004 -> 0.006",
        "settings.json",
        editor_id="g00-i02",
        effect=0.1,
        z_score=3.5,
    ),
)
