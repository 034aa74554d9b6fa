"""Patches that people have changed: read strictly, and applied exactly or not at all.

Reads: unified diffs as `Genome.patch_from` writes them, and as editors save them.
Never: guesses where a hunk belongs: each stands at the line that it names, between the lines that
it names, or the whole patch is refused. Nor touches a file on disk.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from darwin_exp.genome import Genome, lines_of
from darwin_exp.hitl.asked import Refused
from darwin_exp.hitl.paths import PathRefused, all_allowed

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_GIT_NAMES = re.compile(r'diff --git "?a/(?P<old>.+?)"? "?b/(?P<new>.+?)"?')
_NO_END = "\\ No newline at end of file"
_NOWHERE = "/dev/null"


@dataclass(frozen=True)
class _Hunk:
    """Some lines of a file, as they were and as they shall be; `start` counts from 0."""

    start: int
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class _Change:
    """What a patch does to one file; a name of None stands for no file."""

    old: str | None
    new: str | None
    hunks: tuple[_Hunk, ...]


def split(content: str) -> tuple[str, str]:
    """Return the head of a review's content (see asked.edit_content), and its patch."""
    head, gap, patch = content.partition("\n\n")
    return head + gap, patch


def check_change(content: str, before: str) -> None:
    """Refuse a changed review that could not be carried out, whatever the parent's code is.

    Args:
        content: as a person changed it.
        before: as it was asked.

    Raises:
        Refused: it is about another rewrite, or is no unified diff.
    """
    head, patch = split(content)
    if head != split(before)[0]:
        raise Refused(
            "the first lines say which rewrite the patch is for; leave them as they are and change "
            "what follows"
        )
    if not _read(patch):
        raise Refused("it holds no change; deny the request instead")


def applied(parent: Genome, patch: str) -> Genome:
    """Return the parent's code with a patch applied to it.

    Raises:
        Refused: it is no unified diff, does not fit the parent's code exactly, or writes where no
            training code belongs.
    """
    files = parent.as_dict
    written: dict[str, str] = {}
    removed: list[str] = []
    for change in _read(patch):
        if change.old is not None and change.old not in files:
            raise Refused(f"the parent has no file {change.old}")
        if change.new != change.old and change.new in files:
            raise Refused(f"{change.new} is there already, and the patch would make it anew")
        text = _patched(files.get(change.old or "", ""), change)
        if change.new is not None:
            written[change.new] = text
        if change.old is not None and change.old != change.new:
            removed.append(change.old)
    try:
        all_allowed((path for path in written if path not in files), files)
        return parent.with_files(written, removed)
    except (PathRefused, ValueError) as error:
        raise Refused(str(error)) from error


def _patched(text: str, change: _Change) -> str:
    lines, done = lines_of(text), 0
    result: list[str] = []
    for hunk in change.hunks:
        end = hunk.start + len(hunk.before)
        if hunk.start < done or tuple(lines[hunk.start : end]) != hunk.before:
            raise Refused(
                f"{change.old or change.new}: the lines from {hunk.start + 1} on are not "
                "those that the patch expects"
            )
        result += [*lines[done : hunk.start], *hunk.after]
        done = end
    if change.new is None and done < len(lines):
        raise Refused(f"{change.old}: the patch deletes it, but not all of its lines")
    return "".join([*result, *lines[done:]])


# --- reading ----------------------------------------------------------------------------------


def _read(patch: str) -> list[_Change]:
    """Read a unified diff, with or without git's headers.

    Raises:
        Refused: some line of it belongs to none.
    """
    lines = [line.removesuffix("\n") for line in lines_of(patch)]
    changes: list[_Change] = []
    at, git = 0, ""
    while at < len(lines):
        line = lines[at]
        if line.startswith("--- ") and at + 1 < len(lines) and lines[at + 1].startswith("+++ "):
            old, new = _name(line, "a/"), _name(lines[at + 1], "b/")
            hunks, at = _hunks(lines, at + 2)
            if not hunks:
                raise Refused(f"line {at}: a file without a hunk")
            changes.append(_Change(old, new, tuple(hunks)))
            git = ""
        elif line.startswith("diff --git "):
            git, at = line, at + 1
        elif git and line.startswith(("new file mode", "deleted file mode")):
            if not _has_hunks(lines, at):
                path = _GIT_NAMES.fullmatch(git)
                if path is None or path["old"] != path["new"]:
                    raise Refused(f"line {at}: it does not name one file")
                is_new = line.startswith("new")
                name = path["new"]
                changes.append(_Change(None if is_new else name, name if is_new else None, ()))
            at += 1
        elif (git and line.startswith("index ")) or not line.strip():
            at += 1
        else:
            raise Refused(f"line {at + 1} belongs to no unified diff: {line[:80]!r}")
    paths = [path for change in changes for path in {change.old, change.new} if path]
    if len(set(paths)) < len(paths):
        raise Refused("it changes a file twice")
    return changes


def _has_hunks(lines: Sequence[str], at: int) -> bool:
    """Tell whether a file's hunks follow its git header."""
    for line in lines[at + 1 :]:
        if line.startswith("--- "):
            return True
        if line.startswith("diff --git "):
            return False
    return False


def _name(line: str, prefix: str) -> str | None:
    name = line[4:].partition("\t")[0].strip().strip('"')
    if name == _NOWHERE:
        return None
    return name.removeprefix(prefix)


def _hunks(lines: Sequence[str], at: int) -> tuple[list[_Hunk], int]:
    """Return a file's hunks, and where what follows them begins."""
    hunks: list[_Hunk] = []
    while at < len(lines) and (head := _HUNK.match(lines[at])):
        n_before, n_after = (1 if head[k] is None else int(head[k]) for k in (2, 4))
        before: list[str] = []
        after: list[str] = []
        last: list[list[str]] = []  # the sides that the line before this one stood on
        at += 1
        for line in lines[at:]:
            if line.startswith(_NO_END):
                for side in last:
                    side[-1] = side[-1].removesuffix("\n")
                at += 1
                continue
            if len(before) == n_before and len(after) == n_after:
                break
            mark, text = (line[:1] or " "), f"{line[1:]}\n"
            if mark not in " +-":
                raise Refused(f"line {at + 1} is no line of a hunk: {line[:80]!r}")
            last = {" ": [before, after], "-": [before], "+": [after]}[mark]
            for side in last:
                side.append(text)
            at += 1
        if (len(before), len(after)) != (n_before, n_after):
            raise Refused(f"a hunk has other numbers of lines than its head says: {head[0]}")
        # A hunk that takes nothing away stands after the line that it names.
        start = int(head[1]) - 1 if n_before else int(head[1])
        hunks.append(_Hunk(max(start, 0), tuple(before), tuple(after)))
    return hunks, at
