"""The progress of a run: the best so far by rewrites finished, in the unit that fitness stands for.

Reads: facts. Writes: nothing.
Never: shows as a rate what is none: under fitness=mfu a fitness below 0 is nats of perplexity above
the margin, and its agent is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from darwin_exp.chronicle import Agent
from darwin_exp.report.facts import Facts


@dataclass(frozen=True)
class Progress:
    """What rewrites came to, in the order in which they were finished.

    Attributes:
        name: what is shown.
        curve: (rewrites finished, best so far), the base at 0.
        each: (its number from 1, the rewrite, what it came to).
        n_left_out: measured rewrites that have no place on this scale.
    """

    name: str
    lower_is_better: bool
    curve: tuple[tuple[int, float], ...]
    each: tuple[tuple[int, Agent, float], ...]
    n_left_out: int

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

    best = ((k, shown(fitness)) for k, fitness in enumerate(facts.chronicle.best_so_far()))
    measured = [(k, a) for k, a in enumerate(facts.chronicle.rewrites, 1) if a.fitness is not None]
    values = ((k, agent, shown(agent.fitness)) for k, agent in measured)
    each = tuple((k, agent, value) for k, agent, value in values if value is not None)
    return Progress(
        name,
        lower_is_better,
        tuple((k, value) for k, value in best if value is not None),
        each,
        len(measured) - len(each),
    )
