"""Conditions: what approved requests change of the surroundings in which a run trains and scores.

Individuals are compared only where conditions are equal: each change opens a new environment, in
which the base and all living individuals are measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from darwin_exp.individual import DataSpec, SandboxSpec, TrainingSpec


@dataclass(frozen=True)
class ExtraFile:
    """Token ids to train on beside the run's own, and the hash that they must have."""

    file: str
    content_hash: str


@dataclass(frozen=True)
class Conditions:
    """What differs from the run's own surroundings; None and nothing leave those as they are.

    Attributes:
        libraries: names that code may import beside what the contract allows.
    """

    extra_train: tuple[ExtraFile, ...] = ()
    image: str | None = None
    libraries: tuple[str, ...] = ()
    budget_seconds: float | None = None
    max_steps: int | None = None
    memory_mb: int | None = None

    def data(self, own: DataSpec) -> DataSpec:
        """Return what is trained on."""
        return replace(own, extra_train=tuple(Path(extra.file) for extra in self.extra_train))

    def training(self, own: TrainingSpec) -> TrainingSpec:
        """Return how every genome is trained."""
        return replace(
            own,
            budget_seconds=self.budget_seconds or own.budget_seconds,
            max_steps=self.max_steps or own.max_steps,
            memory_mb=self.memory_mb or own.memory_mb,
        )

    def sandbox(self, own: SandboxSpec) -> SandboxSpec:
        """Return what candidates live in."""
        return replace(own, image=self.image or own.image)

    @property
    def changed(self) -> dict[str, Any]:
        """What differs, as JSON."""
        told: dict[str, Any] = {
            entry.name: getattr(self, entry.name)
            for entry in fields(self)
            if getattr(self, entry.name)
        }
        if self.extra_train:
            told["extra_train"] = [vars(extra) for extra in self.extra_train]
        if self.libraries:
            told["libraries"] = list(self.libraries)
        return told

    def environment_id(self, own: Mapping[str, Any]) -> str:
        """Return twelve digits that stand for an environment and these changes of it."""
        told = self.changed
        if self.extra_train:  # by their content, wherever they lie
            told["extra_train"] = [extra.content_hash for extra in self.extra_train]
        text = json.dumps({**own, "changed": told} if told else own, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
