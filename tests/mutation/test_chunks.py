"""Chunks: together they are the file, and each is what it says."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.individual import Genome
from darwin_exp.mutation.chunks import Chunk, chunks_of, chunks_of_file, replaced
from tests.mutation.at_hand import GENOME, TRAIN
from tests.mutation.edited import base_genome

PIECES = st.sampled_from(
    [
        '"""Words.\n\nMore.\n"""\n',
        "import os\n",
        "import os; x = 1\n",
        "from a import (\n    b,\n    c,\n)\n",
        "x = 1\n",
        "x = [\n    1,\n\n    2,\n]\n",
        "# a comment\n",
        "    # an indented comment\n",
        "\n",
        "\x0c\n",
        "def f():\n    return 1\n",
        "def f():\n    return 1\n    # the end of f\n\n    # more\n",
        "@one\n# between\n@two(\n    3\n)\nasync def g(): pass\n",
        "class A:\n    def m(self):\n        '''\nimport no\n'''\n",
        "class B: x = 1; y = 2\n",
        "if x:\n    import os\nelse:\n    def h(): ...\n",
        "x = '''\n# no comment\ndef no(): pass\n'''; y = 2\n",
        "x = 1 \\\n    + 2\n",
        "x = 'é😀'; y = '\u2028\x85'\n",
        "this is no Python\n",
    ]
)


@given(st.lists(PIECES, max_size=8), st.booleans())
def test_the_chunks_of_a_file_are_the_file(pieces: list[str], ends: bool) -> None:
    text = "".join(pieces)
    text = text if ends else text.rstrip("\n")
    chunks = chunks_of_file("a.py", text)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.number for chunk in chunks] == list(range(1, len(chunks) + 1))
    for chunk in chunks:
        assert text[chunk.start : chunk.start + len(chunk.text)] == chunk.text
    try:
        ast.parse(text)
    except SyntaxError:
        return
    for chunk in chunks:  # none is cut within a statement
        ast.parse(chunk.text)


def test_the_trainer_falls_into_chunks_that_say_what_they_are() -> None:
    genome = base_genome()
    chunks = chunks_of(genome)
    for file, text in genome.files:
        assert "".join(chunk.text for chunk in chunks if chunk.file == file) == text
    kinds = {chunk.kind for chunk in chunks}
    assert {"imports", "statements", "whole file", "class GPT", "function learning_rate"} <= kinds
    assert not any("import torch\n" in chunk.text for chunk in chunks if chunk.is_editable)


def test_comments_and_decorators_belong_to_what_follows() -> None:
    text = (
        '"""About."""\n\nimport os\n\n# on x\nx = 1\n\n\n# on f\n@cache\ndef f():\n    pass\n'
        "    # still f\n\n# on A\nclass A:\n    pass\n"
    )
    told = [(chunk.kind, chunk.text) for chunk in chunks_of_file("a.py", text)]
    assert told == [
        ("imports", '"""About."""\n\nimport os\n'),
        ("statements", "\n# on x\nx = 1\n"),
        ("function f", "\n\n# on f\n@cache\ndef f():\n    pass\n    # still f\n"),
        ("class A", "\n# on A\nclass A:\n    pass\n"),
    ]


def test_imports_and_empty_files_are_left_alone() -> None:
    assert [chunk.is_editable for chunk in chunks_of_file("a.py", "import os\nx = 1\n")] == [
        False,
        True,
    ]
    assert chunks_of_file("a.py", "") == []
    assert not chunks_of_file("a.json", "")[0].is_editable


def chunk_named(name: str) -> Chunk:
    return next(chunk for chunk in chunks_of(GENOME) if chunk.name == name)


def test_a_chunk_is_replaced_where_it_stands_and_the_blank_lines_around_it_stay() -> None:
    chunk = next(chunk for chunk in chunks_of(GENOME) if chunk.kind == "function learning_rate")
    changed = replaced(GENOME, chunk, "def learning_rate(progress):\r\n    return 0.1")
    before, after = TRAIN.split(chunk.text)
    assert changed.as_dict["train.py"] == (
        f"{before}\n\ndef learning_rate(progress):\n    return 0.1\n{after}"
    )
    assert changed.as_dict["model.py"] == GENOME.as_dict["model.py"]


@pytest.mark.parametrize("chunk", chunks_of(GENOME), ids=lambda chunk: chunk.name)
def test_a_chunk_replaced_by_itself_changes_nothing(chunk: Chunk) -> None:
    assert replaced(GENOME, chunk, chunk.text) == GENOME
    assert replaced(GENOME, chunk, chunk.text.strip("\n")) == GENOME


def test_several_chunks_of_a_file_are_replaced_from_the_last_to_the_first() -> None:
    chunks = [chunk for chunk in chunks_of(GENOME) if chunk.file == "train.py"]
    genome = GENOME
    for chunk in reversed(chunks):
        genome = replaced(genome, chunk, f"pass  # {chunk.number}")
    numbers = [line[-1] for line in genome.as_dict["train.py"].split("\n") if line]
    assert numbers == [str(chunk.number) for chunk in chunks]


def test_a_chunk_that_has_moved_is_not_replaced() -> None:
    chunk = chunk_named("train.py#3")
    moved = Genome.of({"train.py": f"x = 1\n{TRAIN}"})
    with pytest.raises(ValueError, match="not where it was"):
        replaced(moved, chunk, "x = 2\n")
