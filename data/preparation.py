"""Prepares a data set: text, four splits, no repeats between them, tokens, a folder to keep.

Reads: the source that the request names; prepared folders and the cache below its root.
Writes: <root>/prepared/<name>-<tokenizer>-<hash>/ and <root>/cache/.
Never: shows one process a folder that another is still writing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from darwin_exp.individual import DataSpec
from data import sources
from data.overlap import overlap_with_first, without_repeated_blocks
from data.prepared_folder import (
    SPLITS,
    TEMPORARY_PREFIX,
    DataError,
    Meta,
    SplitMeta,
    Tokens,
    content_hash,
    read_meta,
    verify,
    write_folder,
)
from data.tokenizers import TOKENIZERS, Tokenizer, build_tokenizer

PREPARATION_VERSION = 1  # raise it whenever the same request would give other tokens
NAMES = ("shakespeare", "textdir", "stdlib", "huggingface")


@dataclass(frozen=True)
class DatasetRequest:
    """Which text, cut and encoded how.

    Attributes:
        name: shakespeare, textdir, stdlib or huggingface.
        tokenizer: char, bytes or gpt2.
        path: textdir: a file or folder; huggingface: a local path or a name of the hub.
        splits: shares of the text's characters for train, val, gate and test, in this order.
        dedup_blocks: leave out of a held-out split what stands in an earlier split, and refuse
            a set whose splits still overlap too much. Without it the overlap is only recorded.
        max_overlap: largest share of a held-out split's 13-word grams that may stand in train.
        context_length: every split that is not empty must be longer than this many tokens.
        options: huggingface: subset, split, text_column.
        root: the folder that holds cache/ and prepared/.
    """

    name: str
    tokenizer: str = "char"
    path: Path | None = None
    splits: tuple[float, float, float, float] = (0.85, 0.05, 0.05, 0.05)
    dedup_blocks: bool = True
    max_overlap: float = 0.05
    context_length: int = 64
    options: Mapping[str, str] = field(default_factory=dict)
    root: Path = Path(__file__).resolve().parent


def prepare(request: DatasetRequest, announce: Callable[[str], None] = print) -> DataSpec:
    """Return a prepared data set, making it first where it is missing or damaged.

    Args:
        announce: told, a line at a time, of anything that takes long or was mended.

    Raises:
        DataError: the request, the text or the disk does not allow it.
        DataUnavailable: the text must be fetched and cannot be.
    """
    _check_request(request)
    try:
        source = _source_of(request, announce)
        folder = request.root / "prepared" / _folder_name(request, source)
        spec = _already_prepared(folder)
        if spec is None:
            spec = _build_alone(request, source, folder, announce)
    except OSError as error:
        raise DataError(
            f"{error.filename or request.root}: {error.strerror or error}; set paths.data to a "
            "folder that can be written and has room"
        ) from error
    _refuse_unfit(request, read_meta(spec.folder))
    return spec


def _check_request(request: DatasetRequest) -> None:
    if request.name not in NAMES:
        raise DataError(f"dataset.name: {request.name!r} is unknown; use {', '.join(NAMES)}")
    if request.tokenizer not in TOKENIZERS:
        raise DataError(
            f"dataset.tokenizer: {request.tokenizer!r} is unknown; use {', '.join(TOKENIZERS)}"
        )
    shares = request.splits
    if len(shares) != len(SPLITS) or any(not share >= 0 for share in shares):
        raise DataError("dataset.splits: give four shares of at least 0: train, val, gate, test")
    if abs(math.fsum(shares) - 1) > 1e-6:
        raise DataError(f"dataset.splits: the shares sum to {math.fsum(shares):g}; make it 1")
    if shares[0] == 0 or shares[1] == 0:
        raise DataError("dataset.splits: train and val must be above 0")
    if not 0 <= request.max_overlap <= 1:
        raise DataError(f"dataset.max_overlap: {request.max_overlap} must lie between 0 and 1")


def _source_of(request: DatasetRequest, announce: Callable[[str], None]) -> sources.Source:
    cache = request.root / "cache"
    if request.name == "shakespeare":
        return sources.shakespeare(cache, announce)
    if request.name == "textdir":
        return sources.textdir(request.path)
    if request.name == "stdlib":
        return sources.stdlib()
    return sources.huggingface(request.path, request.options, cache)


def _folder_name(request: DatasetRequest, source: sources.Source) -> str:
    made_of = [PREPARATION_VERSION, request.name, request.tokenizer, request.splits]
    made_of += [request.dedup_blocks, source.sha256]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    return f"{request.name}-{request.tokenizer}-{digest[:12]}"


def _already_prepared(folder: Path) -> DataSpec | None:
    """Return the set in a folder, or None where there is none.

    A damaged one counts as missing here; whoever then builds it says so.
    """
    try:
        spec = read_meta(folder).spec(folder)
        verify(spec)
    except DataError:
        return None
    return spec


def _build_alone(
    request: DatasetRequest, source: sources.Source, folder: Path, announce: Callable[[str], None]
) -> DataSpec:
    with _lock(folder.parent, announce):
        spec = _already_prepared(folder)  # perhaps another process has just finished it
        if spec is not None:
            return spec
        if folder.exists():
            announce(f"data: {_damage(folder)}; building it again")
            shutil.rmtree(folder)
        for leftover in folder.parent.glob(f"{TEMPORARY_PREFIX}*"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        return _build(request, source, folder, announce)


def _damage(folder: Path) -> str:
    try:
        verify(read_meta(folder).spec(folder))
    except DataError as error:
        return str(error).split(";")[0]
    return f"{folder} was damaged"


@contextmanager
def _lock(folder: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from building below the same folder; the kernel frees it at exit."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce(f"data: waiting for another process that prepares data in {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    request: DatasetRequest, source: sources.Source, folder: Path, announce: Callable[[str], None]
) -> DataSpec:
    text = source.read()
    announce(f"data: preparing {folder.name} from {len(text):,} characters")
    pieces = split_text(text, request.splits)
    removed: list[list[str]] = [[] for _ in pieces]
    if request.dedup_blocks:
        pieces, removed = without_repeated_blocks(pieces)
    overlaps: list[float | None] = [None, *overlap_with_first(pieces)]
    tokenizer = build_tokenizer(request.tokenizer, text, request.root / "cache", announce)
    tokens = [
        _encoded(tokenizer, piece, split) for split, piece in zip(SPLITS, pieces, strict=True)
    ]
    splits = {
        split: SplitMeta(
            tokens=len(tokens[place]),
            bytes=len(pieces[place].encode()),
            sha256=hashlib.sha256(tokens[place].astype("<u2").tobytes()).hexdigest(),
            removed_blocks=len(removed[place]),
            removed_bytes=sum(len(block.encode()) for block in removed[place]),
            overlap_with_train=overlaps[place],
        )
        for place, split in enumerate(SPLITS)
    }
    meta = Meta(
        name=request.name,
        tokenizer=request.tokenizer,
        vocabulary=tokenizer.vocabulary,
        vocab_size=len(tokenizer.byte_lengths),
        token_bytes=2,
        splits=splits,
        content_hash=content_hash(request.tokenizer, tokenizer.vocabulary, splits),
        source={**source.facts, "sha256": source.sha256},
        dedup_blocks=request.dedup_blocks,
    )
    _refuse_unfit(request, meta)
    by_split = dict(zip(SPLITS, tokens, strict=True))
    return write_folder(folder, meta, by_split, tokenizer.byte_lengths).spec(folder)


def split_text(text: str, shares: tuple[float, ...]) -> list[str]:
    """Cut a text into contiguous pieces by shares of its characters, the first piece first."""
    pieces: list[str] = []
    start = 0
    for place in range(len(shares)):
        # Rounded, so that the error of adding shares never moves a cut by a character, and a
        # share of 0 at the end stays empty.
        end = int(round(math.fsum(shares[: place + 1]), 9) * len(text))
        pieces.append(text[start:end])
        start = end
    return pieces


def _encoded(tokenizer: Tokenizer, text: str, split: str) -> Tokens:
    """Encode one split and prove that nothing was lost or invented on the way."""
    tokens = tokenizer.encode(text)
    raw = text.encode()
    if tokenizer.decode(tokens) != raw:
        raise DataError(
            f"dataset.tokenizer: decoding {split} does not give back its text; use bytes instead"
        )
    if int(tokenizer.byte_lengths[tokens].sum(dtype=np.int64)) != len(raw):
        raise DataError(
            f"dataset.tokenizer: the tokens of {split} do not add up to its {len(raw)} bytes; "
            "use bytes instead"
        )
    return tokens


def _refuse_unfit(request: DatasetRequest, meta: Meta) -> None:
    """Refuse a set that cannot be trained on, or whose held-out splits train has seen."""
    for split, share in zip(SPLITS, request.splits, strict=True):
        found = meta.splits[split]
        if share > 0 and found.tokens <= request.context_length:
            because = f" after removing {found.removed_blocks} repeated blocks"
            raise DataError(
                f"dataset.splits: {split} has {found.tokens} tokens"
                f"{because if found.removed_blocks else ''}, too few for a context_length of "
                f"{request.context_length}; give more text, a larger share or a shorter context"
            )
        overlap = found.overlap_with_train
        if request.dedup_blocks and overlap is not None and overlap > request.max_overlap:
            raise DataError(
                f"dataset.max_overlap: {overlap:.1%} of the 13-word grams of {split} stand in "
                f"train too, more than {request.max_overlap:.1%}; remove the repeated passages "
                "from the text, or raise dataset.max_overlap"
            )
