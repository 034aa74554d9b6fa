"""Flags: what makes a rewrite one that a person should look at first.

Reads: two genomes. Never: judges whether a rewrite is good.
"""

from __future__ import annotations

from darwin_exp.genome import Genome


def why_flagged(genome: Genome, parent: Genome, most_lines: int) -> str:
    """Return why a rewrite is out of the ordinary, or nothing if it is not.

    Args:
        most_lines: added and removed ones together that count as ordinary.
    """
    before, after = parent.as_dict, genome.as_dict
    reasons = [f"a new file, {path}" for path in sorted(after.keys() - before.keys())]
    reasons += [f"{path} is deleted" for path in sorted(before.keys() - after.keys())]
    n_lines = sum(
        line.startswith(("+", "-")) and not line.startswith(("+++ ", "--- "))
        for line in genome.patch_from(parent).splitlines()
    )
    if n_lines > most_lines:
        reasons.append(f"{n_lines} changed lines")
    return "; ".join(reasons)
