"""Prepares extra training text that a person has approved, for a run that is under way (G4).

Reads: the text that was approved; the run's prepared folder, its held-out splits too, so that none
of their text gets into training.
Writes: <root>/prepared/extra-<hash>/, once, whole or not at all.
Never: changes the run's own data set; what is added is training text and nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.extra_source import Approved, read_approved
from data.held_out import Remainder, held_out_texts, passages, without_held_out
from data.prepared_folder import (
    TEMPORARY_PREFIX,
    DataError,
    Meta,
    read_meta,
    verify,
)
from data.tokenizers import Characters, Tokenizer, build_tokenizer

MOST_LEFT_OUT = 0.1  # of a text, for characters that the run's vocabulary lacks
_CHARACTERS_NAMED = 8


@dataclass(frozen=True)
class ExtraText:
    """Extra training text, ready to be mounted beside a run's train.bin.

    Attributes:
        file: token ids in train.bin's format.
        content_hash: SHA-256 of that file.
        n_bytes: UTF-8 bytes of the text that the tokens stand for.
        removed_blocks: blocks, or lines of long ones, that stood in val, gate or test.
        removed_share: share of the text's bytes that they were.
        licence: in the words of whoever asked for it.
        source: which way the text was had, such as textdir.
        path: which text it was, as it was approved.
    """

    file: Path
    content_hash: str
    tokens: int
    n_bytes: int
    removed_blocks: int
    removed_share: float
    licence: str
    source: str
    path: str


def prepare_extra(
    main: Path,
    source: str,
    path: str,
    licence: str,
    most_mb: int,
    root: Path,
    max_overlap: float,
    announce: Callable[[str], None],
    forbidden: tuple[Path, ...] = (),
) -> ExtraText:
    """Return an extra text in the run's own tokens, without anything that the run holds out.

    Args:
        main: the prepared folder of the run's data set; it is read and never changed.
        source: shakespeare, textdir, stdlib or huggingface.
        path: which text; see `Approved`.
        licence: under which it may be used.
        most_mb: how long it may be. A longer one is refused, never cut.
        root: the folder that holds cache/ and prepared/.
        max_overlap: largest share of it that may stand in val, gate and test, and be taken out.
        announce: told, a line at a time, what is done.
        forbidden: folders of which nothing may be read, beside the prepared data themselves.

    Raises:
        DataError: one line says what does not allow it.
        DataUnavailable: the text or the tokenizer must be fetched and cannot be.
    """
    if not licence.strip():
        raise DataError("extra text: say under which licence it may be used")
    if not 0 <= max_overlap <= 1:
        raise DataError(f"dataset.max_overlap: {max_overlap} must lie between 0 and 1")
    try:
        meta = read_meta(main)
        verify(meta.spec(main))
        approved = Approved(source, path, most_mb, (*forbidden, main, root / "prepared"))
        announce(f"data: reading extra text, {source} {path!r}")
        text, facts = read_approved(approved, root / "cache", announce)
        tokenizer = _tokenizer_of(main, meta, root / "cache", announce)
        readable, left_out = _within_vocabulary(text, meta)
        held_out = held_out_texts(main, meta, tokenizer)
        remainder = without_held_out(readable, held_out, max_overlap)
        _refuse_unfit(remainder, max_overlap)
        tokens = _tokens_of(tokenizer, remainder.text, meta.token_bytes)
        record = {
            "source": source,
            "path": path,
            "licence": licence,
            "most_mb": most_mb,
            "facts": facts,
            "data_set": meta.content_hash,
            "tokenizer": meta.tokenizer,
            "token_bytes": meta.token_bytes,
            "content_hash": hashlib.sha256(tokens).hexdigest(),
            "tokens": len(tokens) // meta.token_bytes,
            "bytes": len(remainder.text.encode()),
            "left_out_blocks": left_out,
            "removed_blocks": remainder.removed_passages,
            "removed_share": remainder.removed_share,
        }
        extra = _kept(root / "prepared", record, tokens, announce)
    except OSError as error:
        raise DataError(
            f"extra text: {error.filename or root}: {error.strerror or error}; make it readable, "
            "or set paths.data to a folder that can be written and has room"
        ) from error
    announce(
        f"data: {extra.tokens:,} tokens of extra text in {extra.file.parent.name}; left out were "
        f"{extra.removed_blocks} blocks ({extra.removed_share:.1%}) that are held out, and "
        f"{left_out} with characters that the vocabulary lacks"
    )
    return extra


def verify_extra(file: Path, content_hash: str) -> None:
    """Check that an extra text still is what it was when it was approved and prepared.

    Raises:
        DataError: it is missing, or its content is another.
    """
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(
            f"{file} is missing ({error.strerror}); a run that trained on it cannot go on without"
        ) from error
    if found != content_hash:
        raise DataError(
            f"{file} holds another text ({found[:12]}) than the one that was added "
            f"({content_hash[:12]}); put that one back"
        )


# --- the run's own tokens ---------------------------------------------------------------------


def _tokenizer_of(
    main: Path, meta: Meta, cache: Path, announce: Callable[[str], None]
) -> Tokenizer:
    """Return the very tokenizer of a prepared folder, and prove that it is."""
    tokenizer: Tokenizer
    if meta.vocabulary is not None:
        tokenizer = Characters(np.array([ord(one) for one in meta.vocabulary], dtype=np.uint32))
    else:
        tokenizer = build_tokenizer(meta.tokenizer, "", cache, announce)
    stored = np.load(main / "token_byte_lengths.npy", allow_pickle=False)
    if not np.array_equal(tokenizer.byte_lengths, stored):
        raise DataError(
            f"extra text: the tokenizer {meta.tokenizer} is not the one that {main} was made "
            "with; prepare the data again"
        )
    return tokenizer


def _within_vocabulary(text: str, meta: Meta) -> tuple[str, int]:
    """Leave out the blocks that hold characters without a token; return the rest, and how many.

    Blocks rather than characters, because words with holes are no text, and because a character
    that is dropped later could hide a copy of held-out text until then.
    """
    if meta.vocabulary is None:
        return text, 0
    known = frozenset(meta.vocabulary)
    kept: list[str] = []
    lost: list[str] = []
    for passage in passages(text):
        (kept if known.issuperset(passage) else lost).append(passage)
    share = sum(map(len, lost)) / max(1, len(text))
    if share > MOST_LEFT_OUT:
        missing = Counter(one for passage in lost for one in passage if one not in known)
        named = ", ".join(repr(one) for one, _ in missing.most_common(_CHARACTERS_NAMED))
        raise DataError(
            f"extra text: {share:.0%} of it would be left out, more than {MOST_LEFT_OUT:.0%}, for "
            f"characters that the run's vocabulary lacks ({named}); replace them in the text"
        )
    return "".join(kept), len(lost)


def _refuse_unfit(remainder: Remainder, max_overlap: float) -> None:
    if remainder.removed_share > max_overlap:
        raise DataError(
            f"extra text: at least {remainder.removed_share:.1%} of it stands in the run's val, "
            f"gate or test, more than the {max_overlap:.1%} of dataset.max_overlap; by accident or "
            "not, that is a copy of what models are scored on, so nothing of it is taken"
        )
    if not remainder.text.strip():
        raise DataError("extra text: nothing of it is left to train on; name another text")


def _tokens_of(tokenizer: Tokenizer, text: str, token_bytes: int) -> bytes:
    tokens = tokenizer.encode(text)
    if tokenizer.decode(tokens) != text.encode():
        raise DataError("extra text: decoding its tokens does not give it back; name another text")
    return tokens.astype(f"<u{token_bytes}").tobytes()


# --- the folder -------------------------------------------------------------------------------


def _kept(
    prepared: Path, record: Mapping[str, Any], tokens: bytes, announce: Callable[[str], None]
) -> ExtraText:
    """Write tokens and record, unless they are there already."""
    told = json.dumps(record, indent=1, sort_keys=True) + "\n"
    # With the record, so that one text under two licences is two folders.
    target = prepared / f"extra-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    extra = ExtraText(
        file=target / "train.bin",
        content_hash=record["content_hash"],
        tokens=record["tokens"],
        n_bytes=record["bytes"],
        removed_blocks=record["removed_blocks"],
        removed_share=record["removed_share"],
        licence=record["licence"],
        source=record["source"],
        path=record["path"],
    )
    with _alone(prepared):
        if target.exists():
            try:
                verify_extra(extra.file, extra.content_hash)
                if (target / "meta.json").read_text(encoding="utf-8") == told:
                    return extra
                announce(f"data: {target / 'meta.json'} is damaged; writing it again")
            except (DataError, OSError, ValueError) as error:
                announce(f"data: {str(error).split(';')[0]}; writing it again")
            shutil.rmtree(target)
        _write(target, {"train.bin": tokens, "meta.json": told.encode()})
    return extra


@contextmanager
def _alone(prepared: Path) -> Iterator[None]:
    """Keep other processes from building in the folder: whoever does clears away what is half."""
    prepared.mkdir(parents=True, exist_ok=True)
    with (prepared / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(target: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder so that, whatever happens, it is either complete or not there."""
    building = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
    try:
        building.chmod(0o755)
        for name, content in files.items():
            with (building / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync(building)
        building.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
