"""The progress of a run: the best so far by rewrites finished, in the unit that fitness stands for.

Reads: facts. Writes: nothing.
Never: shows as a rate what is none: under fitness=mfu a fitness below 0 is nats of perplexity above
the margin, and its agent is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from darwin_exp.chronicle import Agent
from darwin_exp.report.facts import Facts


@dataclass(frozen=True)
class Progress:
    """What rewrites came to, in the order in which they were finished.

    Attributes:
        name: what is shown.
        curves: of each environment (rewrites finished, best so far), the base at 0.
        opened_at: of each environment but the first, the rewrites finished before it.
        each: (its number from 1, the rewrite, what it came to).
        n_left_out: measured rewrites that have no place on this scale.
    """

    name: str
    lower_is_better: bool
    curves: tuple[tuple[tuple[int, float], ...], ...]
    opened_at: tuple[int, ...]
    each: tuple[tuple[int, Agent, float], ...]
    n_left_out: int

    @property
    def curve(self) -> tuple[tuple[int, float], ...]:
        """The points of all environments, in order."""
        return tuple(point for curve in self.curves for point in curve)

    @property
    def label(self) -> str:
        """Name its axis."""
        return f"{self.name} ({'lower' if self.lower_is_better else 'higher'} is better)"

    @property
    def remark(self) -> str:
        """Say who was left out, and why; empty where nobody was."""
        if not self.n_left_out:
            return ""
        return f"{self.n_left_out} with perplexity above the margin left out"


def progress(facts: Facts) -> Progress:
    """Return the progress of a run."""
    name, lower_is_better = {
        "perplexity": ("Validation perplexity", True),
        "mfu": ("MFU", False),
    }.get(facts.fitness_name, (f"Fitness ({facts.fitness_name})", False))

    def shown(fitness: float | None) -> float | None:
        if fitness is None or (facts.fitness_name == "mfu" and fitness < 0):
            return None
        return math.exp(-fitness) if facts.fitness_name == "perplexity" else fitness

    found = facts.chronicle.best_by_environment()
    best = (((k, shown(fitness)) for k, fitness in enumerate(one, began)) for began, one in found)
    made = ((k, one, one.measurements[one.made_in].fitness) for k, one in _numbered(facts))
    measured = [(k, agent, fitness) for k, agent, fitness in made if fitness is not None]
    values = ((k, agent, shown(fitness)) for k, agent, fitness in measured)
    each = tuple((k, agent, value) for k, agent, value in values if value is not None)
    return Progress(
        name,
        lower_is_better,
        tuple(tuple((k, value) for k, value in one if value is not None) for one in best),
        tuple(began for began, _ in found[1:]),
        each,
        len(measured) - len(each),
    )


def _numbered(facts: Facts) -> Iterable[tuple[int, Agent]]:
    return enumerate(facts.chronicle.rewrites, 1)
