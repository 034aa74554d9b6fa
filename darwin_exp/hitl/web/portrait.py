"""One agent's portrait: its change, its scores, its model, its memory and what it printed.

Reads: facts, individuals/ID/memory.json. Writes: nothing.
Never: takes what a candidate printed for a fact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from darwin_exp.chronicle import Agent
from darwin_exp.genome import Genome
from darwin_exp.report.effects import PERPLEXITY
from darwin_exp.report.facts import Facts, signed
from darwin_exp.report.patch import FilePatch, patches
from darwin_exp.wording import number

LARGEST_MEMORY = 4_000_000  # bytes
LOG_CHARACTERS = 20_000
LESSON_KEYS = ("individual_id", "editor_id", "summary", "status", "effect", "z_score", "error")


def told_of(agent: Agent) -> str:
    """Return the words by which an agent is found."""
    edits = " ".join(edit.operator for edit in agent.edits)
    return f"{agent.individual_id} {agent.summary} {agent.reason} {edits}".lower()


def change_of(facts: Facts, agent: Agent) -> tuple[tuple[FilePatch, ...], str, str]:
    """Return an agent's patch against its parent, who that is, and why there is none."""
    if not agent.parent_ids:
        return (), "", "None: it is the base."
    parent = agent.parent_ids[0]
    try:
        before, after = (facts.chronicle.genome_of(n) for n in (parent, agent.individual_id))
    except KeyError:
        return (), parent, "The journal holds no rewrite of it."
    return _patches(before, after), parent, "None: its code is its parent's."


@lru_cache(maxsize=64)
def _patches(before: Genome, after: Genome) -> tuple[FilePatch, ...]:
    return tuple(patches(before, after))


def scores(facts: Facts, agent: Agent) -> list[tuple[str, str]]:
    """Return what was measured of an agent, by name, as text."""
    effect = facts.effects.get(agent.individual_id)
    found = [
        (name.replace("_", " "), number(value)) for name, value in sorted(agent.values.items())
    ]
    found.append(("fitness", number(agent.fitness)))
    found += [
        (f"perplexity in environment {index}", number(before.values.get(PERPLEXITY)))
        for index, before in agent.measurements.items()
        if index != agent.environment
    ]
    if effect is not None:
        found.append(("perplexity against its parent", signed(effect.perplexity_percent)))
        found.append(("MFU against its parent", signed(effect.mfu_percent)))
        found.append(("z of its fitness against its parent's", signed_z(effect.z)))
    found += [(f"{name} seconds", f"{value:.1f}") for name, value in sorted(agent.seconds.items())]
    return found


def model_of(facts: Facts, name: str) -> str:
    """Say which language model an agent owns; empty where it owns none."""
    for event in facts.chronicle.of_kind("individual"):
        if event.key == name and (model := event.payload.get("model")):
            warmth = model.get("temperature")
            words = f"{model.get('name')} at {model.get('base_url')}"
            return words if warmth is None else f"{words}, temperature {warmth}"
    return ""


def log_of(facts: Facts, name: str) -> str:
    """Return the end of what an agent's last training printed."""
    found = ""
    for event in facts.chronicle.of_kind("job"):
        payload = event.payload
        if payload.get("individual_id") == name and payload.get("purpose") != "claim":
            found = str(event.measured.get("log_tail") or "") or found
    return found.replace("\r\n", "\n").replace("\r", "\n").rstrip()[-LOG_CHARACTERS:]


def lessons(path: Path) -> list[Mapping[str, Any]]:
    """Return what an agent's editor was told; nothing where that was not written or is no list."""
    try:
        with path.open("rb") as file:
            told = json.loads(file.read(LARGEST_MEMORY))
    except (OSError, ValueError):
        return []
    if not isinstance(told, list):
        return []
    return [{**dict.fromkeys(LESSON_KEYS), **one} for one in told if isinstance(one, dict)]


def signed_z(value: float | None) -> str:
    """Return a z-score with its sign; a dash where there is none."""
    return "–" if value is None else f"{value:+.1f}".replace("-", "−")
