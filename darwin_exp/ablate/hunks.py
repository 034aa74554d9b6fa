"""Hunks: the pieces of a patch, each of which can be applied or left out.

Reads: two genomes. Writes: nothing.
Never: cuts a patch in other places than `champion.patch` does, so that both can be read together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from darwin_exp.genome import lines_of
from darwin_exp.individual import Genome

LONGEST_GIST = 60  # characters of a hunk's first line that are shown
CONTEXT = 3  # unchanged lines that keep two changes in one hunk, as in unified diffs


@dataclass(frozen=True)
class Hunk:
    """One piece of a patch.

    Attributes:
        number: its place among the hunks of its file, from 1.
        start: first line of the base that it replaces, from 0.
        end: the line after the last one that it replaces.
        lines: what it puts there.
        header: the line that begins it in the patch.
        whole_file: "new" or "deleted" where the file itself comes or goes with it, else empty.
    """

    file: str
    number: int
    start: int
    end: int
    lines: tuple[str, ...]
    header: str
    whole_file: str = ""

    @property
    def gist(self) -> str:
        """Its header and the first line that it brings, or else that it only removes."""
        if self.whole_file:
            return f"{self.whole_file} file"
        first = next((line.strip() for line in self.lines if line.strip()), "")
        return f"{self.header} {first[:LONGEST_GIST] or 'lines removed'}"


def hunks_between(base: Genome, champion: Genome) -> list[Hunk]:
    """Return the hunks that turn one genome into another, by file and line."""
    before, after = base.as_dict, champion.as_dict
    found: list[Hunk] = []
    for file in sorted(before.keys() | after.keys()):
        old, new = lines_of(before.get(file, "")), lines_of(after.get(file, ""))
        if file not in before or file not in after:
            whole = "new" if file in after else "deleted"
            found.append(Hunk(file, 1, 0, len(old), tuple(new), "", whole))
            continue
        matcher = difflib.SequenceMatcher(None, old, new)
        for number, group in enumerate(matcher.get_grouped_opcodes(CONTEXT), start=1):
            changes = [code for code in group if code[0] != "equal"]
            if not changes:  # two files without a difference
                continue
            (_, i1, _, j1, _), (_, _, i2, _, j2) = changes[0], changes[-1]
            header = (
                f"@@ -{_range(group[0][1], group[-1][2])} +{_range(group[0][3], group[-1][4])} @@"
            )
            found.append(Hunk(file, number, i1, i2, tuple(new[j1:j2]), header))
    return found


def with_hunks(base: Genome, hunks: Iterable[Hunk]) -> Genome:
    """Return the base with some of its hunks applied; all of them make the champion."""
    files = {file: lines_of(text) for file, text in base.files}
    gone: set[str] = set()
    # From the last to the first, so that the line numbers of those to come still hold.
    for hunk in sorted(hunks, key=lambda hunk: (hunk.file, hunk.start), reverse=True):
        if hunk.whole_file == "deleted":
            gone.add(hunk.file)
        else:
            files.setdefault(hunk.file, [])[hunk.start : hunk.end] = hunk.lines
    return Genome.of({file: "".join(lines) for file, lines in files.items() if file not in gone})


def _range(start: int, end: int) -> str:
    """Return the lines [start, end) as a unified diff counts them."""
    length = end - start
    if length == 1:
        return str(start + 1)
    return f"{start + 1 if length else start},{length}"
