"""Answers for a model that is a table of scores, without torch: the fake of these tests.

It speaks the protocol of `darwin_exp/evaluation/logits_server.py` and, as the real one does, runs
the genome's own `model.py` in its very process; so whatever a model can do to the one it can do to
the other. The standard library alone, so that it works in an image that holds nothing else.

`model.py` defines `answer(table, sequences, arguments)`: a list per sequence of a row of scores per
token. `table` is the checkpoint's tensor of that name, row by row; `arguments` is model.json.
"""

import importlib
import json
import math
import struct
import traceback
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

REQUEST = struct.Struct("<6I")
ANSWER = struct.Struct("<B3I")
LOGITS, USES, RATE, LOAD, FORWARD = 1, 2, 3, 4, 5
DONE, FAILED = 0, 1
MAX_ERROR_CHARACTERS = 4_000

Sizes = tuple[int, int, int]


def serve(_job: Mapping[str, Any], folder: Path, reader: BinaryIO, writer: BinaryIO) -> None:
    """Answer requests until the other side closes its end."""
    table = None
    while header := reader.read(REQUEST.size):
        what, n_rows, length, steps, _, _ = REQUEST.unpack(header)
        tokens = array("i", reader.read(4 * n_rows * length)).tolist()
        sequences = [tokens[row * length : (row + 1) * length] for row in range(n_rows)]
        status = DONE
        try:
            table = table or Table(folder)
            sizes, content = table.reply(what, sequences, steps)
        except BaseException as error:
            text = traceback.format_exc() if what == LOAD else type(error).__name__
            status, content = FAILED, text[-MAX_ERROR_CHARACTERS:].encode()
            sizes = (len(content), 0, 0)
        writer.write(ANSWER.pack(status, *sizes))
        writer.write(content)
        writer.flush()


class Table:
    """The saved table, and the genome's idea of how to answer from it."""

    def __init__(self, folder: Path) -> None:
        raw = (folder / "in" / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        entry = json.loads(raw[8:end])["table"]
        begin, (n_rows, width) = end + entry["data_offsets"][0], entry["shape"]
        self.rows = [
            array("f", raw[begin + 4 * width * row : begin + 4 * width * (row + 1)])
            for row in range(n_rows)
        ]
        self.arguments = json.loads((folder / "in" / "model.json").read_text(encoding="utf-8"))
        self.model = importlib.import_module("model")

    def reply(self, what: int, sequences: list[list[int]], steps: int) -> tuple[Sizes, bytes]:
        """Return the sizes and the content of the answer to one request."""
        n_tokens = sum(map(len, sequences))
        if what == LOAD:
            return (0, 0, 0), b""
        if what == USES:
            content = json.dumps({"rows": {"table": n_tokens}, "activation_flops": 0}).encode()
            return (len(content), 0, 0), content
        if what == LOGITS:
            answers = self.model.answer(self.rows, sequences, self.arguments)
            content = b"".join(array("f", row).tobytes() for rows in answers for row in rows)
            return (len(answers), len(answers[0]), len(answers[0][0])), content
        losses: list[float] = []  # a table has no backward pass: forward ones take as long
        n_rows = len(sequences) // steps
        for start in range(0, len(sequences), n_rows):
            tokens = sequences[start : start + n_rows]
            for sequence, rows in zip(
                tokens, self.model.answer(self.rows, tokens, self.arguments), strict=True
            ):
                losses += map(self.loss, rows, [*sequence[1:], sequence[0]])
        return (len(sequences), len(sequences[0]), 0), struct.pack(f"<{len(losses)}f", *losses)

    @staticmethod
    def loss(row: Sequence[float], target: int) -> float:
        """Return what a token costs under the scores of its row."""
        return math.log(sum(map(math.exp, row))) - row[target]
