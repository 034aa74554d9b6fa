"""What was measured, in words for an editor.

Reads: individuals, and how far runs of the same code differ.
Writes: lines of text.
Never: shows a number for what was not measured.
"""

from __future__ import annotations

import math

from darwin_exp.individual import Individual

Named = tuple[tuple[str, str], ...]

_METRICS: Named = (
    ("val_perplexity", " (lower is better)"),
    ("val_bpb", " (bits per byte, lower is better)"),
    ("n_parameters", ""),
)
_RATES: Named = (("mfu", " (higher is better)"), ("tokens_per_second", " (higher is better)"))


def compared(
    parent: Individual, base: Individual | None, noise: float | None, with_rates: bool
) -> str:
    """Return the parent's results beside the base's, and what a difference means.

    Args:
        noise: standard deviation of the base's repeated fitness; None until it is known.
        with_rates: whether what depends on measured time is told too.
    """
    lines = []
    if base is not None and base.individual_id == parent.individual_id:
        lines.append("The parent is the base, with which everything is compared.\n")
        base = None
    for name, hint in (*_METRICS, *(_RATES if with_rates else ())):
        ours = parent.measured(name)
        theirs = base.measured(name) if base is not None else None
        if ours is not None:
            lines.append(f"- {name}{hint}: parent {_number(ours)}{_beside(ours, theirs)}\n")
    if parent.fitness is None:
        lines.append("- fitness: not known yet\n")
    else:
        line = f"- fitness (higher is better): parent {_number(parent.fitness)}"
        if base is not None and base.fitness is not None:
            effect = parent.fitness - base.fitness
            line += f", base {_number(base.fitness)}, {effect:+.4g}"
            line += f", z = {effect / (noise * math.sqrt(2.0)):+.1f}" if noise else ""
        lines.append(f"{line}\n")
    return "".join(lines) + _on_noise(noise)


def reached(agent: Individual, with_rates: bool) -> str:
    """Return an agent's main results in a few words."""
    names = ("val_perplexity", "val_bpb", *(("mfu",) if with_rates else ()))
    found = [*((name, agent.measured(name)) for name in names), ("fitness", agent.fitness)]
    told = [f"{name} {_number(value)}" for name, value in found if value is not None]
    return ", ".join(told) or "nothing that is known yet"


def _beside(ours: float, theirs: float | None) -> str:
    if theirs is None:
        return ""
    percent = f", {100 * (ours / theirs - 1):+.2f} %" if theirs else ""
    return f", base {_number(theirs)}{percent}"


def _on_noise(noise: float | None) -> str:
    if not noise:
        return (
            "How far runs of the same code differ is not known yet: a small difference may be "
            "chance.\n"
        )
    return (
        f"Runs of the same code differ in fitness by a standard deviation of {noise:.2g}. z is a "
        "difference in units of what two such runs differ by; below about 2 it may be chance.\n"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"
