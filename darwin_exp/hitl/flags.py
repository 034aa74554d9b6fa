"""Flags: what makes a rewrite one that a person should look at first.

Reads: two genomes. Never: judges whether a rewrite is good.
"""

from __future__ import annotations

import difflib

from darwin_exp.genome import Genome, lines_of

ORDINARY_WIDTH = 100  # characters of a changed line; what is wider counts as more than one


def why_flagged(genome: Genome, parent: Genome, most_lines: int) -> str:
    """Return why a rewrite is out of the ordinary, or nothing if it is not.

    Args:
        most_lines: added and removed ones together that count as ordinary, of ordinary width.
    """
    before, after = parent.as_dict, genome.as_dict
    reasons = [f"a new file, {path}" for path in sorted(after.keys() - before.keys())]
    reasons += [f"{path} is deleted" for path in sorted(before.keys() - after.keys())]
    lines = [
        line
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
        for line in _changed(before.get(path, ""), after.get(path, ""))
    ]
    n_characters = sum(map(len, lines))
    if len(lines) > most_lines:
        reasons.append(f"{len(lines)} changed lines")
    elif n_characters > most_lines * ORDINARY_WIDTH:
        reasons.append(f"{n_characters:,} characters in {len(lines)} changed lines")
    return "; ".join(reasons)


def _changed(before: str, after: str) -> list[str]:
    """Return the removed and the added lines, whatever they look like."""
    old, new = lines_of(before), lines_of(after)
    found: list[str] = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new).get_opcodes():
        if kind != "equal":
            found += [*old[i1:i2], *new[j1:j2]]
    return found
