"""Prepares a data set from the command line and prints its splits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data.preparation import NAMES, DatasetRequest, prepare
from data.prepared_folder import DataError, DataUnavailable, read_meta
from data.tokenizers import TOKENIZERS


def main(arguments: list[str] | None = None) -> int:
    """Prepare one data set; return 0, or 2 after one line that says what is wrong."""
    default = DatasetRequest("shakespeare")
    parser = argparse.ArgumentParser(prog="python -m data", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--tokenizer", choices=TOKENIZERS, help="char; bytes for stdlib")
    parser.add_argument("--path", type=Path, help="the text of textdir and huggingface")
    parser.add_argument("--root", type=Path, default=default.root, help="holds cache/, prepared/")
    parser.add_argument("--fallback", choices=NAMES, help="prepare this where nothing is fetched")
    chosen = parser.parse_args(arguments)
    try:
        try:
            show(chosen.name, chosen.tokenizer, chosen.path, chosen.root)
        except DataUnavailable as error:
            if chosen.fallback is None:
                raise
            print(f"{error}\nPreparing {chosen.fallback} INSTEAD of {chosen.name}.")
            show(chosen.fallback, chosen.tokenizer, chosen.path, chosen.root)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def show(name: str, tokenizer: str | None, path: Path | None, root: Path) -> None:
    """Prepare a set and print a table of its splits."""
    tokenizer = tokenizer or ("bytes" if name == "stdlib" else "char")
    spec = prepare(DatasetRequest(name, tokenizer, path, root=root))
    meta = read_meta(spec.folder)
    print(f"{name} ({tokenizer}, {meta.vocab_size} token ids): {spec.folder}")
    print(f"{'split':<6}{'tokens':>12}{'bytes':>12}{'removed':>10}{'overlap':>9}  sha256")
    for split, found in meta.splits.items():
        overlap = found.overlap_with_train
        print(
            f"{split:<6}{found.tokens:>12,}{found.bytes:>12,}{found.removed_bytes:>10,}"
            f"{'' if overlap is None else f'{overlap:.2%}':>9}  {found.sha256[:12]}"
        )


if __name__ == "__main__":
    sys.exit(main())
