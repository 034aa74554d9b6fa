"""Chunks: the pieces into which a genome is cut when each is to be edited by itself.

Reads: the files of a genome.
Writes: a genome in which some chunks stand replaced.
Never: loses a byte; the chunks of a file, one after the other, are the file.

A Python file falls into its imports (with the docstring above them), each class and each function
at its top level, and the statements in between. Comments, blank lines and decorators belong to what
follows them, an indented comment to what it follows. Any other file is one chunk.
Source: the pieces that DARWIN's paper has its agents rewrite one by one.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from darwin_exp.genome import lines_of, parse_python
from darwin_exp.individual import Genome

IMPORTS = "imports"
STATEMENTS = "statements"
COMMENTS = "comments"
WHOLE_FILE = "whole file"


@dataclass(frozen=True)
class Chunk:
    """A piece of a file.

    Attributes:
        number: its place within the file, from 1.
        kind: "imports", "statements", "comments", "whole file", or as in "class GPT" and
            "function train_step".
        start: characters before it in the file.
    """

    file: str
    number: int
    kind: str
    start: int
    text: str

    @property
    def name(self) -> str:
        return f"{self.file}#{self.number}"

    @property
    def is_editable(self) -> bool:
        """Imports are left alone, and what holds no code."""
        return self.kind not in (IMPORTS, COMMENTS) and bool(self.text.strip())


def chunks_of(genome: Genome) -> tuple[Chunk, ...]:
    """Return the chunks of all files, in their order."""
    return tuple(chunk for file, text in genome.files for chunk in chunks_of_file(file, text))


def chunks_of_file(file: str, text: str) -> list[Chunk]:
    """Return the chunks of one file; one alone where it is no Python or does not parse."""
    pieces = [(WHOLE_FILE, text)]
    if file.endswith(".py"):
        try:
            pieces = _cut(text)
        except (SyntaxError, ValueError, RecursionError):
            pieces = [(STATEMENTS, text)]
    chunks, start = [], 0
    for number, (kind, piece) in enumerate(pieces, start=1):
        chunks.append(Chunk(file, number, kind, start, piece))
        start += len(piece)
    return chunks


def replaced(genome: Genome, chunk: Chunk, text: str) -> Genome:
    """Return a genome with new source in the place of a chunk.

    Where several chunks of a file are replaced, the last of them goes first: those before it then
    still stand where they stood. The blank lines around a chunk stay as they were.

    Raises:
        ValueError: the chunk does not stand there (any more).
    """
    old = genome.as_dict.get(chunk.file, "")
    end = chunk.start + len(chunk.text)
    if old[chunk.start : end] != chunk.text:
        raise ValueError(f"{chunk.name} is not where it was")
    new = old[: chunk.start] + _set_in(text, chunk.text) + old[end:]
    return genome.with_files({chunk.file: new})


def _set_in(text: str, before: str) -> str:
    """Return new source with the blank lines that stood around the old one."""
    source = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    if not source:
        return ""
    body = before.strip("\n")
    if source == body:
        return before
    above = before[: len(before) - len(before.lstrip("\n"))]
    below = before[len(before.rstrip("\n")) :]
    return f"{above}{source}{below or chr(10)}"


def _cut(text: str) -> list[tuple[str, str]]:
    """Return the kind and the text of each piece of a Python file.

    Raises:
        SyntaxError, ValueError, RecursionError: it does not parse.
    """
    lines = lines_of(text)
    groups: list[tuple[str, int]] = []  # kind and last line, counted from 1
    for position, node in enumerate(parse_python(text).body):
        kind, last = _kind(node, position), node.end_lineno or node.lineno
        if groups and _first_line(node) <= groups[-1][1]:  # both on one line
            groups[-1] = (groups[-1][0], max(last, groups[-1][1]))
        elif groups and kind == groups[-1][0] and kind in (IMPORTS, STATEMENTS):
            groups[-1] = (kind, last)
        else:
            groups.append((kind, last))
    if not groups:
        return [(COMMENTS, text)] if text else []
    pieces, start = [], 0
    for place, (kind, last) in enumerate(groups):
        is_last = place == len(groups) - 1
        end = len(lines) if is_last else _with_indented_comments(lines, last)
        pieces.append((kind, "".join(lines[start:end])))
        start = end
    return pieces


def _kind(node: ast.stmt, position: int) -> str:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return IMPORTS
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"function {node.name}"
    is_docstring = (
        position == 0
        and isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
    return IMPORTS if is_docstring else STATEMENTS


def _first_line(node: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _with_indented_comments(lines: list[str], last: int) -> int:
    """Return the last line of a piece once the comments within its block are counted in."""
    end = last
    for number in range(last, len(lines)):
        line = lines[number]
        if line.strip() and not line.lstrip().startswith("#"):
            break
        if line[0] in " \t" and line.strip():
            end = number + 1
    return end
