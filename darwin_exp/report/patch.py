"""The selected agent's patch against the base, as marked-up lines.

Reads: two genomes. Writes: markup in which every byte of theirs is escaped.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from markupsafe import Markup, escape

from darwin_exp.individual import Genome
from darwin_exp.unseen import spelt_out

CONTEXT = 3
LARGEST_HIGHLIGHTED = 200_000  # characters of one file


@dataclass(frozen=True)
class Line:
    """A line of a patch; its numbers are None on the side where it does not exist.

    Attributes:
        kind: "same", "added", "removed", or "gap" between two hunks.
    """

    kind: str
    before: int | None
    after: int | None
    code: Markup

    @property
    def sign(self) -> str:
        return {"added": "+", "removed": "−"}.get(self.kind, "")


@dataclass(frozen=True)
class FilePatch:
    """What became of one file."""

    path: str
    what: str  # changed, added or removed
    n_added: int
    n_removed: int
    lines: tuple[Line, ...]


def patches(before: Genome, after: Genome) -> list[FilePatch]:
    """Return the changes that turn one genome into the other, by file."""
    found = []
    for path in sorted(before.as_dict.keys() | after.as_dict.keys()):
        old, new = before.as_dict.get(path), after.as_dict.get(path)
        if old == new:
            continue
        lines = tuple(_lines(path, old or "", new or ""))
        what = "added" if old is None else "removed" if new is None else "changed"
        counts = [sum(line.kind == kind for line in lines) for kind in ("added", "removed")]
        found.append(FilePatch(path, what, counts[0], counts[1], lines))
    return found


def _lines(path: str, old: str, new: str) -> Iterator[Line]:
    before, after = _split(old), _split(new)
    old_code, new_code = _highlighted(path, before), _highlighted(path, after)
    groups = difflib.SequenceMatcher(None, before, after).get_grouped_opcodes(CONTEXT)
    for k, group in enumerate(groups):
        if k or group[0][1] > 0:
            yield Line("gap", None, None, Markup("⋯"))
        for kind, i1, i2, j1, j2 in group:
            if kind == "equal":
                for i, j in zip(range(i1, i2), range(j1, j2), strict=True):
                    yield Line("same", i + 1, j + 1, new_code[j])
                continue
            for i in range(i1, i2):
                yield Line("removed", i + 1, None, old_code[i])
            for j in range(j1, j2):
                yield Line("added", None, j + 1, new_code[j])


def _split(text: str) -> list[str]:
    lines = spelt_out(text.replace("\r\n", "\n")).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _highlighted(path: str, lines: Sequence[str]) -> list[Markup]:
    """Return the lines with their syntax marked, or plain where there is no lexer for them."""
    plain = [escape(line) for line in lines]
    text = "\n".join(lines)
    if len(text) > LARGEST_HIGHLIGHTED:
        return plain
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import JsonLexer, PythonLexer, TOMLLexer, YamlLexer

    lexers = {
        ".py": PythonLexer,
        ".json": JsonLexer,
        ".toml": TOMLLexer,
        ".yaml": YamlLexer,
        ".yml": YamlLexer,
    }
    lexer = lexers.get(PurePosixPath(path).suffix)
    if lexer is None or not lines:
        return plain
    marked = highlight(text, lexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True))
    found = [Markup(line) for line in marked.split("\n")]
    if found and not found[-1] and len(found) == len(lines) + 1:
        found.pop()
    return found if len(found) == len(lines) else plain
