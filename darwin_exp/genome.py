"""A genome: an immutable tree of training code, known by its content.

Two hashes tell genomes apart: `id` by their bytes, `fingerprint` by what their code does as far as
a parser can tell, so that an edit of comments, layout or a seed is seen to be no edit.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

GENOME_SUFFIXES = (".py", ".json", ".toml", ".yaml", ".yml", ".txt")
NOT_GENOME = frozenset({"job.json", "model.json", "requirements.txt"})
OUTPUT_FOLDER = "out"  # beside train.py: what a training by hand leaves is no training code
MAX_GENOME_BYTES = 1_000_000
_PARSING = threading.Lock()
_DISTURBANCES = 20  # that one parsing bears
_NO_FILE, _EMPTY_FILE = "0000000", "e69de29"  # as git calls them


@dataclass(frozen=True)
class Genome:
    """An immutable tree of training code; two genomes with the same bytes are the same genome.

    Attributes:
        files: text of every file by its POSIX path relative to the tree, sorted by path.
    """

    files: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, files: Mapping[str, str]) -> Genome:
        """Build a genome from a mapping of path to text.

        Line breaks become plain line feeds, as Python reads them anyway: only then are a folder,
        a patch and the genome that they came from the same on every machine.

        Raises:
            ValueError: a path is absolute, leaves the tree or is none that `from_folder` would
                read back, or the tree is too large.
        """
        for path in files:
            if str(PurePosixPath(path)) != path or not _belongs(PurePosixPath(path)):
                raise ValueError(f"a genome cannot hold the path {path!r}")
        files = {
            path: text.replace("\r\n", "\n").replace("\r", "\n") for path, text in files.items()
        }
        if sum(len(text.encode()) for text in files.values()) > MAX_GENOME_BYTES:
            raise ValueError(f"a genome holds at most {MAX_GENOME_BYTES} bytes of source")
        return cls(tuple(sorted(files.items())))

    @classmethod
    def from_folder(cls, folder: Path) -> Genome:
        """Read the training code below a folder.

        Hidden files, caches, prose, the harness's own files and `out/` are left out.

        Raises:
            ValueError: the folder is missing, has no train.py or model.py, or is not UTF-8 text.
        """
        if not folder.is_dir():
            raise ValueError(f"genome.dir: {folder} is not a folder")
        files: dict[str, str] = {}
        for path in sorted(folder.rglob("*")):
            relative = PurePosixPath(path.relative_to(folder))
            if path.is_symlink() or not path.is_file() or not _belongs(relative):
                continue
            try:
                files[str(relative)] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"genome.dir: {path} is not UTF-8 text") from error
        for needed in ("train.py", "model.py"):
            if needed not in files:
                raise ValueError(f"genome.dir: {folder} holds no {needed} (see CONTRACT.md)")
        return cls.of(files)

    def write_to(self, folder: Path) -> None:
        """Write the tree below a folder, which is made if it is missing."""
        for path, text in self.files:
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")

    def with_files(self, changed: Mapping[str, str], removed: Iterable[str] = ()) -> Genome:
        """Return this genome with some files replaced, added or removed."""
        files = {**self.as_dict, **changed}
        for path in removed:
            files.pop(path, None)
        return Genome.of(files)

    @cached_property
    def as_dict(self) -> dict[str, str]:
        return dict(self.files)

    @cached_property
    def id(self) -> str:
        """The content hash, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.files).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """A hash that ignores comments, docstrings, layout and seeds."""
        normal = [(path, _normalised(path, text)) for path, text in self.files]
        return hashlib.sha256(json.dumps(normal).encode()).hexdigest()

    def patch_from(self, other: Genome) -> str:
        """Return the unified diff that turns `other` into this genome."""
        pairs = {
            path: (other.as_dict.get(path), self.as_dict.get(path))
            for path in sorted(self.as_dict.keys() | other.as_dict.keys())
        }
        changed = {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}
        # Only git's headers can say that an empty file comes or goes, and then all must have one.
        as_git = any(not before and not after for before, after in changed.values())
        lines: list[str] = []
        for path, (before, after) in changed.items():
            lines += _git_header(path, before, after) if as_git else []
            lines += _file_diff(path, before, after)
        return "".join(lines)


def lines_of(text: str) -> list[str]:
    """Split text after its line feeds, and nowhere else, as patches do."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _belongs(path: PurePosixPath) -> bool:
    """Tell whether a file at a path of the tree is training code."""
    if not path.parts or path.is_absolute() or "\\" in str(path) or not str(path).isprintable():
        return False
    if path.parts[0] == OUTPUT_FOLDER or path.name in NOT_GENOME:
        return False
    # The first dot also stands for "..", which would leave the tree.
    hidden = any(part.startswith((".", "__pycache__")) for part in path.parts)
    return not hidden and path.suffix in GENOME_SUFFIXES


def _git_header(path: str, before: str | None, after: str | None) -> list[str]:
    quote = '"' if " " in path else ""
    header = [f"diff --git {quote}a/{path}{quote} {quote}b/{path}{quote}\n"]
    if before is None or after is None:
        header.append(f"{'new' if before is None else 'deleted'} file mode 100644\n")
    if not before and not after:
        ids = (_NO_FILE, _EMPTY_FILE) if before is None else (_EMPTY_FILE, _NO_FILE)
        header.append(f"index {ids[0]}..{ids[1]}\n")
    return header


def _file_diff(path: str, before: str | None, after: str | None) -> list[str]:
    end = "\t" if " " in path else ""  # where a name with a space ends
    old_name = "/dev/null" if before is None else f"a/{path}{end}"
    new_name = "/dev/null" if after is None else f"b/{path}{end}"
    diff = difflib.unified_diff(lines_of(before or ""), lines_of(after or ""), old_name, new_name)
    # A last line without a line break needs git's marker, or the patch would not apply.
    return [
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in diff
    ]


class _Normaliser(ast.NodeTransformer):
    """Drops what cannot change what code does: docstrings, and the values of seeds."""

    def _without_docstring(self, node: Any) -> Any:
        self.generic_visit(node)
        body = node.body
        if (
            body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            node.body = body[1:] or [ast.Pass()]
        return node

    visit_Module = _without_docstring  # noqa: N815
    visit_ClassDef = _without_docstring  # noqa: N815
    visit_FunctionDef = _without_docstring  # noqa: N815
    visit_AsyncFunctionDef = _without_docstring  # noqa: N815

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if "seed" in name.lower():
            node.args, node.keywords = [], []
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        names = [getattr(t, "attr", getattr(t, "id", "")) for t in node.targets]
        if any("seed" in name.lower() for name in names) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(0)
        return node


def parse_python(text: str) -> ast.Module:
    """Parse Python source, one thread at a time.

    CPython counts the depth of the tree that it builds once for all threads, so that two that parse
    at the same time may end in a SystemError (its issue 106905). Libraries parse too, and know
    nothing of our turn: one of ours that is disturbed is done again.

    Raises:
        SyntaxError, ValueError, RecursionError: it is no Python, or nested too deeply.
    """
    with _PARSING:
        n_disturbances = 0
        while True:
            try:
                return ast.parse(text)
            except MemoryError as error:  # what the parser says of some that are nested too deeply
                raise RecursionError("it is nested too deeply") from error
            except SystemError:
                n_disturbances += 1
                if n_disturbances > _DISTURBANCES:
                    raise


def _normalised(path: str, text: str) -> str:
    try:
        if path.endswith(".py"):
            return ast.dump(_Normaliser().visit(parse_python(text)))
        if path.endswith(".json"):
            return json.dumps(json.loads(text), sort_keys=True)
    except (SyntaxError, ValueError, RecursionError):
        pass  # code that does not parse is compared as it stands
    return text
