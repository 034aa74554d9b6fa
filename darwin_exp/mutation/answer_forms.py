"""How a language model is told to answer: one text for each form that answer.py reads."""

from __future__ import annotations

from collections.abc import Mapping

_JSON_HEAD = """\
Answer with one JSON object and nothing else. It has these keys, all of them:
- "reasoning": how you come to the change, in a few sentences.
- "summary": one line of at most 200 characters for everybody's memory: what the change is, with \
its numbers.
- "expected_effect": one line: what you expect to improve, by how much, and why.
"""
_JSON_TAIL = """\
- "requests": what you would ask people for, mostly []. Each is {"type", "reason", "content"}. \
"reason" says what it should improve, and by how much. "content" is a JSON object as text: for \
"dataset" (more training text) {"source", "path", "licence", "most_mb"}; for "script" (a file for \
your code) {"path", "text"}; for "file_structure" {"moves": {old: new}, "files": {path: text}, \
"removes": [path]}; for "library" {"requirement": "name==version"}; for "resources" {"key": \
"budget_seconds", "max_steps" or "memory_mb", "value"}; for "question" plain words. Nobody answers \
before this rewrite is trained, so it must do without; a later prompt says what became of it.
"""
_PATHS = "Only .py, .json, .toml, .yaml and .txt files of the genome may be written."

FORM_TEXTS: Mapping[str, str] = {
    "edits": f"""\
{_JSON_HEAD}- "edits": a list of {{"file", "search", "replace"}}. "search" is copied from the file \
letter by letter, spaces included, and stands there exactly once: take whole lines, and as many as \
make it unique. "replace" is what shall stand in its place. An empty "search" writes the whole \
file, a new one too. Edits of one file are made in their order, and all edits are made or none. \
{_PATHS}
{_JSON_TAIL}""",
    "rewrite": f"""\
{_JSON_HEAD}- "files": a list of {{"file", "text"}}: the whole new text of every file that you \
change or add, and of no other. All of them are written or none. {_PATHS}
{_JSON_TAIL}""",
    "chunk": f"""\
{_JSON_HEAD}- "text": the whole new source of the chunk, which stands in the place of the old one. \
Define at least what the old one defines, with the names that the rest of the code uses. To leave \
it unchanged, return it as it stands.
{_JSON_TAIL}""",
    "text": f"""\
Answer with these two lines and, below them, one block for each place that you change:

Summary: one line of at most 200 characters: what the change is, with its numbers
Expected effect: one line: what you expect to improve, by how much, and why

file: train.py
<<<<<<< SEARCH
lines copied from the file letter by letter, which stand there exactly once
=======
the lines that shall stand in their place
>>>>>>> REPLACE

An empty upper half writes the whole file, a new one too. Blocks are made in their order, and all \
of them or none. {_PATHS}
""",
}
