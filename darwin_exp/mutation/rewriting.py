"""Rewrites: exact search and replace in the files of a genome, all of it or nothing.

Reads: a genome, and edits that may come from anywhere.
Writes: a new genome; the old one is never changed.
Never: guesses. A search text stands exactly once in its file or the whole answer is turned down,
with a sentence from which whoever wrote it can do better.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from darwin_exp.genome import lines_of
from darwin_exp.individual import Genome, Reason
from darwin_exp.mutation.quoting import has_mark, one_line
from darwin_exp.protocols import EditFailed

_LONGEST_PATH = 200
_PLAIN_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*")
_LINES_COMPARED = 2_000  # of a file, when the closest line is looked for
_SHOWN = 160  # characters of a line that is shown


@dataclass(frozen=True)
class FileEdit:
    """One change of one file.

    Attributes:
        file: its path in the genome.
        search: what stands there, exactly once; empty means the whole file, or a new one.
        replace: what shall stand there.
    """

    file: str
    search: str
    replace: str


def apply(genome: Genome, edits: Iterable[FileEdit]) -> Genome:
    """Return a genome with all edits made in their order, each on what the last one left.

    Raises:
        EditFailed: one of them does not fit (DOES_NOT_APPLY), names a file that must not be written
            (FORBIDDEN_PATH), or all together change nothing (NO_OP). The genome is as it was.
    """
    edits = tuple(edits)
    files = dict(genome.files)
    touched: set[str] = set()
    # Whole files are told apart by their names; of several places in one file only a number is.
    numbered = len(edits) > 1 and any(edit.search for edit in edits)
    for number, edit in enumerate(edits, start=1):
        try:
            new = _made(edit, files, edit.file in touched)
        except EditFailed as refusal:
            if not numbered:
                raise
            told = f"edit {number} of {len(edits)}: {refusal}"
            raise EditFailed(refusal.reason, told, again=True) from refusal
        touched.add(edit.file)
        files[edit.file] = new
    try:
        changed = Genome.of(files)
    except ValueError as error:  # every path has been checked: it is too large
        raise _does_not_apply(str(error)) from error
    if changed == genome:
        raise EditFailed(Reason.NO_OP, "the answer changes nothing", again=True)
    return changed


def _made(edit: FileEdit, files: Mapping[str, str], is_touched: bool) -> str:
    """Return what an edit makes of its file.

    Args:
        is_touched: whether an earlier edit of the same answer changed that file.

    Raises:
        EditFailed: it does not fit, or names a file that must not be written.
    """
    check_path(edit.file, files)
    if not edit.search:
        if is_touched:
            raise _does_not_apply(
                f"an edit with an empty search writes all of {edit.file}, and an earlier one of "
                "the same answer would be lost"
            )
        new = _line_feeds(edit.replace)
    elif edit.file not in files:
        raise _does_not_apply(
            f"there is no file {edit.file}; an edit with an empty search writes a new one"
        )
    else:
        new = replaced_once(files[edit.file], edit.search, edit.replace, edit.file)
    _check_marks(edit.file, files.get(edit.file, ""), new)
    return new


def replaced_once(text: str, search: str, replace: str, file: str) -> str:
    """Return a text in which `replace` stands where `search` stood.

    The only leeway: a last line without a line break is found by a search that ends with one.

    Args:
        file: what the text is called in the complaint.

    Raises:
        EditFailed: the search text does not stand there exactly once.
    """
    search, replace = _line_feeds(search), _line_feeds(replace)
    places = _places(text, search)
    if not places and search.strip("\n") and text.endswith(search.removesuffix("\n")):
        start = len(text) - len(search.removesuffix("\n"))
        return text[:start] + replace.removesuffix("\n")
    if not places:
        raise _does_not_apply(
            f"a search text stands nowhere in {file}{_closest(text, search, file)}"
        )
    if len(places) > 1:
        lines = ", ".join(str(text.count("\n", 0, place) + 1) for place in places[:5])
        raise _does_not_apply(
            f"a search text stands {len(places)} times in {file} (from lines {lines}), not once: "
            "take more of the lines around it along"
        )
    return text[: places[0]] + replace + text[places[0] + len(search) :]


def check_path(path: str, files: Mapping[str, str]) -> None:
    """Check that a path may be written beside the files of a genome.

    Raises:
        EditFailed: it leaves the tree, is no training code, or could be taken for another file.
    """
    if path not in files and not _PLAIN_PATH.fullmatch(path):
        raise _forbidden(path, "a new path is made of letters, digits and ._- between slashes")
    if len(path.encode("utf-8", "replace")) > _LONGEST_PATH:
        raise _forbidden(path, f"a path has at most {_LONGEST_PATH} bytes")
    if unicodedata.normalize("NFC", path) != path:
        raise _forbidden(path, "its letters are not in the normal form (NFC)")
    try:
        Genome.of({path: ""})
    except ValueError as error:
        raise _forbidden(
            path,
            "only .py, .json, .toml, .yaml and .txt files below the genome's folder may be written,"
            " and none that belongs to the harness",
        ) from error
    if path in files:
        return
    spelt = {_folded(part): part for name in files for part in (name, *_folders(name))}
    for part in (path, *_folders(path)):
        known = spelt.get(_folded(part), part)
        if known != part:
            raise _forbidden(path, f"it differs from {known} in nothing but its spelling")
        if part in files:
            raise _forbidden(path, f"{part} is a file and no folder")
    if path in spelt.values():
        raise _forbidden(path, f"{path} is a folder and no file")


def _folders(path: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(path).parents][:-1]


def _folded(path: str) -> str:
    return unicodedata.normalize("NFKC", path).casefold()


def _places(text: str, search: str) -> list[int]:
    """Return where a text begins in another, places that overlap included."""
    if not search:
        return [] if text else [0]
    places, place = [], text.find(search)
    while place >= 0:
        places.append(place)
        place = text.find(search, place + 1)
    return places


def _line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_marks(file: str, before: str, after: str) -> None:
    """Check that no new line could pass for the frame of a file in a later prompt."""
    known = set(lines_of(before))
    if has_mark("".join(line for line in lines_of(after) if line not in known)):
        raise _does_not_apply(
            f"a new line of {file} begins like a mark of the prompt (=== file, === end of); "
            "code has no need of it"
        )


def _closest(text: str, search: str, file: str) -> str:
    """Return what stands in a file instead of a search text, as the rest of a sentence."""
    lines, wanted = text.split("\n"), search.split("\n")
    missing = next((line for line in wanted if line.strip() and line not in lines), None)
    # The first line of a search may be the end of one in the file.
    is_end = missing is wanted[0] and len(wanted) > 1
    if missing is None or (is_end and any(line.endswith(missing) for line in lines)):
        return f", though its lines do: not one after the other: {one_line(search, _SHOWN)!r}"
    shown = f"; this line of it is not there: {one_line(missing, _SHOWN)!r}"
    bare = "".join(missing.split())
    for number, line in enumerate(lines, start=1):
        if "".join(line.split()) == bare:
            return f"{shown}\nline {number} of {file} differs from it in spaces alone"
    near = difflib.get_close_matches(
        missing[:_SHOWN], [line[:_SHOWN] for line in lines[:_LINES_COMPARED]], n=1
    )
    if not near:
        return f"{shown}\nno line of {file} is like it"
    number = next(n for n, line in enumerate(lines, start=1) if line[:_SHOWN] == near[0])
    return f"{shown}\nthe closest is line {number} of {file}: {one_line(near[0], _SHOWN)!r}"


def _does_not_apply(message: str) -> EditFailed:
    return EditFailed(Reason.DOES_NOT_APPLY, message, again=True)


def _forbidden(path: str, why: str) -> EditFailed:
    return EditFailed(
        Reason.FORBIDDEN_PATH, f"{one_line(path, 80)!r} cannot be written: {why}", again=True
    )
