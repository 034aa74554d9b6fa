"""A Python file under edit: changes that are told in roles and in pieces of source.

Comments and layout survive, because the syntax tree keeps them. Edits know nothing of that
tree: they name a class, a method or a callee and hand over source text.

Reads: the text of one file.
Writes: the changed text, as `Code.text`.
Never: runs the code.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Collection, Sequence
from typing import cast

import libcst as cst

from darwin_exp.genome import parse_python
from darwin_exp.mutation.builtin import does_not_apply
from darwin_exp.mutation.loop import Loop
from darwin_exp.mutation.roles import Method
from darwin_exp.mutation.syntax import (
    Changed,
    argument_of_one_plus_cosine,
    calls,
    has_comment,
    import_order,
    is_definition,
    is_import,
    is_number,
    is_product,
    last_name,
    own_call,
    sole_target,
    source_of,
    statements,
    walk,
)

_IMPORTS = {
    "F": "import torch.nn.functional as F",
    "ThreadPoolExecutor": "from concurrent.futures import ThreadPoolExecutor",
    "gc": "import gc",
    "lru_cache": "from functools import lru_cache",
    "math": "import math",
    "nn": "from torch import nn",
    "torch": "import torch",
}


class Code(Loop):
    """One Python file under edit; `text` is what has become of it."""

    # --- changing expressions -----------------------------------------------------------------

    def replace_calls(
        self,
        callees: Collection[str],
        new: Callable[[list[str]], str | None],
        within: Method | None = None,
    ) -> int:
        """Replace every call of these by an expression built from its arguments' sources.

        Keyword arguments are left out. Returns how many calls were replaced, in the file or in
        one method; `new` returns None for one that shall stay.
        """
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if isinstance(node, cst.Call) and last_name(node.func) in callees:
                values = [source_of(a.value) for a in node.args if a.keyword is None and not a.star]
                expression = new(values)
                if expression is not None:
                    count += 1
                    return cst.parse_expression(expression)
            return node

        self._change(change, within=self._method(within) if within else None)
        return count

    def wrap_arguments(self, callee: str, names: Sequence[str], wrap: Callable[[str], str]) -> int:
        """Wrap some arguments, given by position or by keyword, of every call of `callee`.

        A plain variable that is passed once gets a line of its own before the call; anything
        else is wrapped where it stands. Returns how many were wrapped.
        """
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> Changed:
            nonlocal count
            if not isinstance(node, cst.SimpleStatementLine):
                return node
            lines: list[cst.SimpleStatementLine] = []
            for call in calls(node, [callee]):
                passed = [source_of(argument.value) for argument in call.args]
                for position, argument in enumerate(call.args):
                    keyword = argument.keyword.value if argument.keyword else None
                    by_position = keyword is None and not argument.star and position < len(names)
                    if not by_position and keyword not in names:
                        continue
                    count += 1
                    source = passed[position]
                    if isinstance(argument.value, cst.Name) and passed.count(source) == 1:
                        (line,) = statements(f"{source} = {wrap(source)}")
                        lines.append(cast(cst.SimpleStatementLine, line))
                    else:
                        wrapped = cst.parse_expression(wrap(source))
                        node = cast(
                            cst.SimpleStatementLine, node.deep_replace(argument.value, wrapped)
                        )
            if not lines:
                return node
            lines[0] = lines[0].with_changes(leading_lines=node.leading_lines)
            return cst.FlattenSentinel([*lines, node.with_changes(leading_lines=[])])

        self._change(change)
        return count

    def redirect_calls(self, callee: str, new: str, first_argument: str) -> None:
        """Call `new` instead of `callee`, with one more argument before the others."""

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            if isinstance(node, cst.Call) and last_name(node.func) == callee:
                comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
                extra = cst.Arg(cst.Name(first_argument), comma=comma)
                return node.with_changes(func=cst.Name(new), args=[extra, *node.args])
            return node

        self._change(change)

    def replace_half_cosine(self, new: Callable[[str], str]) -> int:
        """Replace `0.5 * a * (1 + cos(pi * x))`, with or without a, by `a * new(x)`."""
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if not (is_product(node) and isinstance(node.right, cst.BinaryOperation)):
                return node
            x = argument_of_one_plus_cosine(node.right)
            if x is None:
                return node
            shape = cst.parse_expression(new(source_of(x)))
            if is_number(node.left, 0.5):
                count += 1
                return shape
            if is_product(node.left) and is_number(node.left.left, 0.5):
                count += 1
                return node.with_changes(left=node.left.right, right=shape)
            return node

        self._change(change)
        return count

    def wrap_returns(self, method: Method, wrap: Callable[[str], str]) -> int:
        """Wrap what a method returns; a returned tuple is left alone and not counted."""
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if not isinstance(node, cst.Return) or node.value is None:
                return node
            if isinstance(node.value, cst.Tuple):
                return node
            count += 1
            source = source_of(node.value)
            if not isinstance(node.value, cst.Name | cst.Call | cst.Attribute):
                source = f"({source})"
            return node.with_changes(value=cst.parse_expression(wrap(source)))

        self._change(change, within=self._method(method))
        return count

    def drop_added_call(self, method: Method, attribute: str) -> bool:
        """Turn `a + self.attribute(...)` into `a` within a method; return whether it was found.

        A variable that was only made for that call goes with it.
        """
        names: set[str] = set()

        def is_it(node: cst.CSTNode) -> bool:
            return own_call(node) == attribute

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Add):
                for dropped, kept in ((node.left, node.right), (node.right, node.left)):
                    if is_it(dropped):
                        names.update(n.value for n in walk(dropped) if isinstance(n, cst.Name))
                        return kept
            return node

        self._change(change, within=self._method(method))
        if not names or any(is_it(node) for node in walk(self._method(method))):
            return False
        for name in sorted(names - {"self", attribute}):
            self._drop_unread_variable(method, name)
        return True

    # --- words --------------------------------------------------------------------------------

    def reword(self, old: str, new: str) -> None:
        """Change words in comments and docstrings, where they stand, so that they stay true."""
        text = self.text
        if old not in text:
            return
        lines = text.splitlines(keepends=True)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            prose = token.type == tokenize.COMMENT or token.string.startswith(('"""', "'''"))
            if prose and old in token.string:
                (first, _), (last, _) = token.start, token.end
                for number in range(first - 1, last):
                    lines[number] = lines[number].replace(old, new)
        self._module = cst.parse_module("".join(lines))

    # --- changing statements ------------------------------------------------------------------

    def drop_class_if_unused(self, name: str) -> None:
        """Remove a top-level class that nothing in the file refers to any more."""
        body = list(self._module.body)
        for position, node in enumerate(body):
            if is_definition(node, name):
                del body[position]
                if body[position:] and has_comment(node):
                    # A heading above the class is one for what follows, too.
                    heading = cast(cst.ClassDef, node).leading_lines
                    body[position] = body[position].with_changes(leading_lines=heading)
                break
        else:
            return
        rest = self._module.with_changes(body=body)
        if not any(isinstance(node, cst.Name) and node.value == name for node in walk(rest)):
            self._module = rest

    def append(self, method: Method, source: str) -> None:
        """Add statements at the end of a method."""
        node = self._method(method)
        block = cast(cst.IndentedBlock, node.body)
        longer = block.with_changes(body=[*block.body, *statements(source)])
        self._swap(node, node.with_changes(body=longer))

    def need(self, *names: str) -> None:
        """Import the names among these that the file does not import at its top level yet."""
        bound = {
            alias.asname or alias.name
            for node in parse_python(self.text).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for name in names:
            if name not in bound:
                self._import(_IMPORTS[name])

    def _import(self, source: str) -> None:
        (new,) = statements(source)
        body = list(self._module.body)
        imports = [i for i, node in enumerate(body) if is_import(node)]
        ours = [i for i in imports if "__future__" not in source_of(body[i])]
        if not ours:
            raise does_not_apply(f"{self.path} imports nothing")
        # Plain imports before `from` ones and by name within them, as most files have it.
        later = [i for i in ours if import_order(source_of(body[i])) > import_order(source)]
        position = later[0] if later else ours[-1] + 1
        if position == ours[0]:
            first = cast(cst.SimpleStatementLine, body[position])
            new = new.with_changes(leading_lines=first.leading_lines)
            body[position] = first.with_changes(leading_lines=[])
        body.insert(position, new)
        self._module = self._module.with_changes(body=body)

    def insert_before(self, name: str, source: str) -> None:
        """Add top-level definitions before the class or function of this name."""
        for position, node in enumerate(self._module.body):
            if is_definition(node, name):
                self._define_at(position, source)
                return
        raise does_not_apply(f"{self.path} defines no {name}")

    # --- the tree -----------------------------------------------------------------------------

    def _drop_unread_variable(self, method: Method, name: str) -> None:
        uses = [
            node
            for node in walk(self._method(method))
            if isinstance(node, cst.Name) and node.value == name
        ]
        if len(uses) > 1:
            return

        def change(_: cst.CSTNode, node: cst.CSTNode) -> Changed:
            target = sole_target(node)
            if isinstance(target, cst.Name) and target.value == name:
                return cst.RemoveFromParent()
            return node

        self._change(change, within=self._method(method))
