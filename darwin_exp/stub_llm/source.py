"""Small changes of source text, and the search-and-replace edits that lead from one to another.

Reads: source, as it stands in a prompt.
Writes: new source.
Never: guesses: what is looked for stands there exactly once, or the change does not fit.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from darwin_exp.genome import lines_of, parse_python

Files = Mapping[str, str]
T = TypeVar("T")


class DoesNotFit(Exception):
    """A change has no place in this code."""


@dataclass(frozen=True)
class Replacement:
    """Text that stands once in a file, and what shall stand there; an empty search makes a file."""

    file: str
    search: str
    replace: str


@dataclass(frozen=True)
class Code:
    """What a change is made of: the files of a prompt, and what else it may go by.

    Attributes:
        rng: for what could be chosen either way, such as a factor.
        log: the quoted end of a failed run's log; empty in a first draft.
        evidence: the word in the log that says what failed, such as a name that is not defined.
    """

    files: Files
    rng: Random
    log: str = ""
    evidence: str = ""

    @property
    def model(self) -> str:
        return text_at(self.files, "model.py")

    @property
    def train(self) -> str:
        return text_at(self.files, "train.py")

    @property
    def settings(self) -> str:
        return text_at(self.files, "settings.json")


# --- text ---------------------------------------------------------------------------------------


def text_at(files: Files, path: str) -> str:
    """Return a file's text; raises DoesNotFit where the prompt does not show it."""
    if path not in files:
        raise DoesNotFit(f"{path} is not shown")
    return files[path]


def once(text: str, old: str, new: str) -> str:
    """Replace what stands exactly once; raises DoesNotFit where it does not."""
    if (n := text.count(old)) != 1:
        raise DoesNotFit(f"{old!r} stands {n} times")
    return text.replace(old, new)


def once_like(text: str, pattern: str, template: str) -> str:
    """Replace what matches a pattern exactly once; raises DoesNotFit where it does not."""
    matches = list(re.finditer(pattern, text, re.MULTILINE))
    if len(matches) != 1:
        raise DoesNotFit(f"{pattern!r} matches {len(matches)} times")
    match = matches[0]
    return text[: match.start()] + match.expand(template) + text[match.end() :]


def absent(text: str, *words: str) -> None:
    """Raise DoesNotFit where one of the words stands in the text already."""
    for word in words:
        if word in text:
            raise DoesNotFit(f"{word!r} is there already")


def lines_with(text: str, word: str) -> list[str]:
    return [line for line in lines_of(text) if word in line]


def sole(items: Sequence[T], what: str) -> T:
    """Return the only item; raises DoesNotFit where there are none or several."""
    if len(items) != 1:
        raise DoesNotFit(f"{len(items)} {what}")
    return items[0]


# --- settings -----------------------------------------------------------------------------------


def settings_in(files: Files) -> dict[str, Any]:
    """Return what settings.json holds; raises DoesNotFit where it is no JSON object."""
    try:
        values = json.loads(text_at(files, "settings.json"))
    except ValueError as error:
        raise DoesNotFit(f"settings.json: {error}") from error
    if not isinstance(values, dict):
        raise DoesNotFit("settings.json is no object")
    return values


def with_settings(files: Files, **values: Any) -> dict[str, str]:
    """Return settings.json with other values and its layout as it was."""
    text, present = text_at(files, "settings.json"), settings_in(files)
    for name, value in values.items():
        if name not in present or present[name] == value:
            raise DoesNotFit(f"{name} is missing, or {value} already")
        text = once_like(text, rf'("{name}"\s*:\s*)[^,\s}}]+', rf"\g<1>{json.dumps(value)}")
    return {"settings.json": text}


# --- syntax -------------------------------------------------------------------------------------


def parse(text: str) -> ast.Module:
    try:
        return parse_python(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DoesNotFit(f"it does not parse: {error}") from error


def calls(root: ast.AST, name: str) -> list[ast.Call]:
    """Return the calls of a function or method, by its last name."""
    return [
        node
        for node in ast.walk(root)
        if isinstance(node, ast.Call)
        and name in (getattr(node.func, "attr", None), getattr(node.func, "id", None))
    ]


def function(root: ast.Module | ast.ClassDef, name: str) -> ast.FunctionDef:
    """Return a function or method that is defined directly in a module or class."""
    found = [node for node in root.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return sole(found, f"definitions of {name}")


def class_calling(tree: ast.Module, name: str) -> ast.ClassDef:
    """Return the class that calls a function."""
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and calls(node, name)]
    return sole(found, f"classes that call {name}")


def model_class(tree: ast.Module) -> ast.ClassDef:
    """Return the class of which `build_model` returns an instance."""
    for node in ast.walk(function(tree, "build_model")):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call):
            name = getattr(node.value.func, "id", "")
            found = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
            return sole(found, f"classes {name}")
    raise DoesNotFit("build_model returns no new model")


def statement_around(root: ast.AST, inner: ast.AST) -> ast.stmt:
    """Return the smallest statement that holds a node."""
    holders = [
        node
        for node in ast.walk(root)
        if isinstance(node, ast.stmt) and any(below is inner for below in ast.walk(node))
    ]
    if not holders:
        raise DoesNotFit("it stands in no statement")
    return holders[-1]  # walked from the outside inwards


def training_loop(tree: ast.Module) -> ast.While:
    """Return the last loop at the top level, which is the one that trains."""
    loops = [node for node in tree.body if isinstance(node, ast.While)]
    if not loops:
        raise DoesNotFit("there is no loop at the top level")
    return loops[-1]


def segment(text: str, node: ast.AST) -> str:
    start, end = _span(text, node)
    return text[start:end]


def spliced(text: str, *changes: tuple[ast.AST, str]) -> str:
    """Replace the source of some nodes, none of which lies within another."""
    spans = sorted(((*_span(text, node), new) for node, new in changes), reverse=True)
    for start, end, new in spans:
        text = text[:start] + new + text[end:]
    return text


def insert_before(text: str, statement: ast.stmt, code: str) -> str:
    """Put lines before a statement, and before the comment right above it."""
    lines = lines_of(text)
    decorators = getattr(statement, "decorator_list", [])
    at = min(node.lineno for node in (statement, *decorators)) - 1
    margin = " " * statement.col_offset
    while at > 0 and lines[at - 1].startswith(f"{margin}#"):
        at -= 1
    return "".join((*lines[:at], _block(code, margin), *lines[at:]))


def insert_after(text: str, statement: ast.stmt, code: str) -> str:
    """Put lines after a statement, at its own margin."""
    lines = lines_of(text)
    at = statement.end_lineno or statement.lineno
    return "".join((*lines[:at], _block(code, " " * statement.col_offset), *lines[at:]))


def _block(code: str, margin: str) -> str:
    # Blank lines are meant; only the line break after the opening quotes is not.
    code = textwrap.dedent(code).removeprefix("\n")
    return textwrap.indent(code if code.endswith("\n") else f"{code}\n", margin)


def _span(text: str, node: ast.AST) -> tuple[int, int]:
    lines = lines_of(text)

    def offset(line: int, column: int) -> int:
        # The parser counts columns in bytes.
        within = lines[line - 1].encode()[:column].decode()
        return sum(map(len, lines[: line - 1])) + len(within)

    at: Any = node
    return offset(at.lineno, at.col_offset), offset(at.end_lineno, at.end_col_offset)


# --- edits --------------------------------------------------------------------------------------

Range = tuple[int, int, int, int]  # lines a to b of the old text become lines c to d of the new


def replacements(path: str, old: str, new: str) -> list[Replacement]:
    """Return edits that turn one text into another, each of which finds its place exactly once."""
    before, after = lines_of(old), lines_of(new)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    changed = [(a, b, c, d) for tag, a, b, c, d in matcher.get_opcodes() if tag != "equal"]
    if not changed:
        return []
    (a, _, c, _), (_, b, _, d) = changed[0], changed[-1]
    # Where single changes get into each other's way, one that spans them all does not.
    for ranges in (changed, [(a, b, c, d)]):
        edits = [
            Replacement(path, "".join(before[a:b]), "".join(after[c:d]))
            for a, b, c, d in _joined([_widened(before, range_) for range_ in ranges])
        ]
        if _applied(old, edits) == new:
            return edits
    return [Replacement(path, "", new)]


def _widened(before: Sequence[str], range_: Range) -> Range:
    """Return a range with so many more lines on either side that its old ones stand only once."""
    a, b, c, d = range_
    old = "".join(before)
    while not _stands_once(old, "".join(before[a:b])) and (a > 0 or b < len(before)):
        if a > 0:
            a, c = a - 1, c - 1
        if b < len(before) and not _stands_once(old, "".join(before[a:b])):
            b, d = b + 1, d + 1
    return a, b, c, d


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """Return the ranges with those that overlap as one."""
    joined: list[Range] = []
    for a, b, c, d in ranges:
        if joined and a <= joined[-1][1]:
            first = joined.pop()
            a, b, c, d = first[0], max(b, first[1]), first[2], max(d, first[3])
        joined.append((a, b, c, d))
    return joined


def _applied(text: str, edits: Sequence[Replacement]) -> str | None:
    """Return the text after some edits, one after the other; None where one finds no one place."""
    for edit in edits:
        if not _stands_once(text, edit.search):
            return None
        text = text.replace(edit.search, edit.replace)
    return text


def _stands_once(text: str, search: str) -> bool:
    """Tell whether a text stands once in another, places that overlap counted apart."""
    return bool(search) and 0 <= text.find(search) == text.rfind(search)
