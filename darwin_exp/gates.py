"""What a rewritten genome must pass before a second of training is spent on it."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath

from darwin_exp.genome import parse_python
from darwin_exp.individual import Genome, JobResult, Reason, Status

# Text and numbers that a rewrite may bring along. Knowledge of the data does not belong into code:
# a table of which letter follows which would fit into a few thousand bytes and beat the base.
MAX_LITERAL_BYTES = 2_000
MAX_COLLECTION = 256  # constants in one list, tuple, set or dictionary
MAX_LITERALS_BYTES = 16_000  # of all literals together
MAX_SOURCE_BYTES = 200_000
# What training code may import (CONTRACT.md): the standard library but for what reaches out of the
# process, and these. It turns down the careless early; it is the sandbox that contains the others.
INSTALLED = frozenset({"torch", "numpy", "safetensors", "triton"})
REACHING_OUT = frozenset(
    {"asyncio", "ctypes", "ftplib", "http", "multiprocessing", "pty", "smtplib", "socket"}
    | {"socketserver", "ssl", "subprocess", "telnetlib", "urllib", "webbrowser", "xmlrpc"}
)
TRACEBACK_LINES = 30


def objection(
    genome: Genome, parent: Genome, libraries: frozenset[str] = frozenset()
) -> tuple[Reason, str] | None:
    """Return why a rewrite cannot be trained, or None if it can.

    Args:
        genome: the rewritten code.
        parent: the code it was made from, which must not be the same but for comments and seeds.
        libraries: what code may import besides, since people approved it into the image.
    """
    for path, text in genome.files:
        try:
            if path.endswith(".py"):
                parse_python(text)
            elif path.endswith(".json"):
                json.loads(text)
        except (SyntaxError, ValueError, RecursionError) as error:
            return Reason.SYNTAX, f"{path} does not parse: {error}"
    for needed in ("train.py", "model.py"):
        if needed not in genome.as_dict:
            return Reason.CONTRACT, f"{needed} is gone (see CONTRACT.md)"
    if foreign := _foreign_import(genome, parent, INSTALLED | libraries):
        return Reason.FORBIDDEN_IMPORT, foreign
    if hidden := _hidden_data(genome, parent):
        return Reason.HIDDEN_DATA, hidden
    if genome.fingerprint == parent.fingerprint:
        return Reason.NO_OP, "nothing changed but comments, layout or a seed"
    return None


def smoke_objection(result: JobResult) -> str | None:
    """Return why code that was trained for a few steps had better not get a budget, or None.

    What we lost ourselves speaks against nobody. The end of what the code printed is quoted line
    by line, since it is no word of ours.
    """
    training = result.training
    if training.status is Status.OK and training.stopped_at_budget:
        return "it does not stop after max_steps of the job file, or a step takes far too long"
    if training.status in (Status.OK, Status.INFRA_LOST):
        return None
    told = f"its first steps ended as {training.status.value} ({training.reason.value})"
    if training.message:
        told += f": {' '.join(training.message.split())}"
    tail = training.log_tail.splitlines()[-TRACEBACK_LINES:]
    return "\n".join([told, *(f"| {line[:200]}" for line in tail)])


def _foreign_import(genome: Genome, parent: Genome, installed: frozenset[str]) -> str | None:
    """Return which import of a rewrite its parent has not and training code has no need of."""
    known = {name for path, text in parent.files if path.endswith(".py") for name in _imports(text)}
    own = {PurePosixPath(path).parts[0].removesuffix(".py") for path, _ in genome.files}
    for path, text in genome.files:
        if not path.endswith(".py"):
            continue
        for name in sorted(_imports(text) - known - own):
            if name in REACHING_OUT:
                return f"{path} imports {name}; training code has no need of it"
            if name not in installed and name not in sys.stdlib_module_names:
                return f"{path} imports {name}, which is not installed (see CONTRACT.md)"
    return None


def _imports(text: str) -> set[str]:
    """Return the top-level names of the modules that a source imports."""
    found: set[str] = set()
    for node in _nodes(text):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _hidden_data(genome: Genome, parent: Genome) -> str | None:
    """Return what looks like data in the place of code, or None.

    What the parent holds already is nobody's doing here: a base genome may bring a table of its
    own. This catches what is careless, not what is clever: data can also be spread over names.
    """
    known = {
        _constants(node)
        for path, text in parent.files
        if path.endswith(".py")
        for node, _ in _large_literals(text)
    }
    for path, text in genome.files:
        if not path.endswith(".py"):
            continue
        for node, what in _large_literals(text):
            if _constants(node) not in known:
                return f"{path}:{node.lineno} holds {what}; code has no need of it"
    for what, count, most in (
        ("literals", _literal_bytes, MAX_LITERALS_BYTES),
        ("source", _source_bytes, MAX_SOURCE_BYTES),
    ):
        if (n := count(genome)) > max(most, count(parent)):
            return f"its {what} have grown to {n:,} bytes, and {most:,} may do"
    return None


def _large_literals(text: str) -> Iterator[tuple[ast.expr, str]]:
    """Yield each literal that is too large for code, and what it is in words."""
    for node in _nodes(text):
        if isinstance(node, ast.Constant):
            if (size := _constant_bytes(node)) > MAX_LITERAL_BYTES:
                yield node, f"a literal of {size:,} bytes"
        elif isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
            n = sum(isinstance(inner, ast.Constant) for inner in ast.walk(node))
            if n > MAX_COLLECTION:
                yield node, f"{n:,} constants in one collection"


def _literal_bytes(genome: Genome) -> int:
    """Return how many bytes of constants the genome's code and its other files hold together."""
    return sum(
        sum(_constant_bytes(node) for node in _nodes(text) if isinstance(node, ast.Constant))
        if path.endswith(".py")
        else len(text.encode())
        for path, text in genome.files
    )


def _nodes(text: str) -> Iterator[ast.AST]:
    """Yield every part of a source; none where it is no Python, which only a parent's may be."""
    try:
        tree = parse_python(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from ast.walk(tree)


def _constants(node: ast.expr) -> tuple[object, ...]:
    """Return the constants within an expression: what it holds, however it is laid out.

    Not by ast.dump, which fails on what is nested deeply and on numbers of thousands of digits.
    """
    return tuple(inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant))


def _source_bytes(genome: Genome) -> int:
    return sum(len(text.encode()) for _, text in genome.files)


def _constant_bytes(constant: ast.Constant) -> int:
    value = constant.value
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, int):
        return (value.bit_length() + 7) // 8
    return 8 if isinstance(value, float | complex) else 0
