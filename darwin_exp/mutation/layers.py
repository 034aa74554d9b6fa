"""The layers of a model under edit: changing how they are made, called and joined by others.

A layer is an attribute that a class's `__init__` assigns and a method calls: `self.expand =
nn.Linear(...)` and `self.expand(x)`. Edits of the model put things around such calls, which holds
up better than knowing the lines in which they stand.

Reads: the text of one file.
Writes: the changed tree.
Never: runs the code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import libcst as cst

from darwin_exp.mutation.builtin import does_not_apply
from darwin_exp.mutation.roles import Method, Roles
from darwin_exp.mutation.syntax import (
    Change,
    Changed,
    argument_of,
    calls,
    changed,
    is_docstring,
    last_name,
    normalised_branch,
    operand,
    own_attribute,
    own_call,
    sole_target,
    source_of,
    statements,
    walk,
    whole_expressions,
)


class Layers(Roles):
    """One Python file whose layers can be asked after, resized, wrapped and joined by others."""

    # --- changing how a layer is made ---------------------------------------------------------

    def remake(
        self, class_name: str, attribute: str, position: int, keyword: str, new: str
    ) -> None:
        """Change one argument in `self.attribute = X(...)`.

        Raises:
            EditFailed: there is no such argument.
        """
        call = self._made(class_name, attribute)
        argument = call and argument_of(call, position, keyword)
        if argument is None:
            raise does_not_apply(f"{self.path}: {class_name}.{attribute} is made in another way")
        self._swap(argument, argument.with_changes(value=cst.parse_expression(new)))

    def join(self, class_name: str, attribute: str, source: str, before: bool = False) -> None:
        """Add statements to `__init__` right after (or before) `self.attribute` is assigned.

        Raises:
            EditFailed: it is not assigned there.
        """
        done = False

        def change(_: cst.CSTNode, node: cst.CSTNode) -> Changed:
            nonlocal done
            target = sole_target(node)
            if done or target is None or own_attribute(target) != attribute:
                return node
            done = True
            line = cast(cst.SimpleStatementLine, node)
            if not before:
                return cst.FlattenSentinel([line, *statements(source)])
            new = statements(source)
            new[0] = new[0].with_changes(leading_lines=line.leading_lines)
            return cst.FlattenSentinel([*new, line.with_changes(leading_lines=[])])

        self._change(change, within=self._method((class_name, "__init__")))
        if not done:
            raise does_not_apply(f"{self.path}: {class_name} does not assign self.{attribute}")

    # --- changing how a layer is called -------------------------------------------------------

    def rewrite_layer_calls(
        self, method: Method, attribute: str, new: Callable[[str, list[str]], str]
    ) -> int:
        """Replace every `self.attribute(...)` in a method; return how many there were.

        `new` gets the source of the call and those of its arguments.
        """
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if isinstance(node, cst.Call) and own_call(node) == attribute:
                count += 1
                values = [source_of(argument.value) for argument in node.args]
                return cst.parse_expression(new(source_of(node), values))
            return node

        self._change(change, within=self._method(method))
        return count

    def wrap_layer_calls(
        self, method: Method, attribute: str, wrap: Callable[[str], str], then: str = ""
    ) -> int:
        """Wrap every `self.attribute(...)` in a method, with the call `.then(...)` on it, if any.

        Where an operator stands beside the call, what it becomes is put in brackets. Returns how
        many were wrapped.
        """
        count = 0
        whole = whole_expressions(self._method(method))

        def change(before: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if not isinstance(node, cst.Call):
                return node
            if then:
                if last_name(node.func) != then or not isinstance(node.func, cst.Attribute):
                    return node
                called = node.func.value
                if attribute not in map(own_call, walk(called)):
                    return node
            elif own_call(node) == attribute:
                called = node
            else:
                return node
            count += 1
            source = wrap(source_of(called))
            return cst.parse_expression(source) if id(before) in whole else operand(source)

        self._change(change, within=self._method(method))
        return count

    def before_layer_call(self, method: Method, attribute: str, source: str) -> None:
        """Add statements before the first line of a method that calls `self.attribute`."""
        self._before(
            method, lambda node: _is_line(node) and attribute in map(own_call, walk(node)), source
        )

    def before_loop(self, method: Method, attribute: str, source: str) -> None:
        """Add statements before the loop of a method over `self.attribute`."""
        loop = self._loop(method, attribute)
        self._before(method, lambda node: node is loop, source)

    def loop_through(self, method: Method, attribute: str, new: str) -> None:
        """Loop over something else instead of `self.attribute`."""
        loop = self._loop(method, attribute)
        if loop is None:
            raise does_not_apply(f"{self.path}: nothing loops over self.{attribute}")

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            return cst.parse_expression(new) if own_attribute(node) == attribute else node

        self._swap(loop, loop.with_changes(iter=changed(loop.iter, change)))

    def before_calls(
        self, callee: str, names: Sequence[str], new: Callable[[list[str]], str]
    ) -> int:
        """Add statements before every line that calls `callee`; return how many there were.

        `new` gets the variables that the call is passed as `names`, which the statements may
        assign anew; an argument that is something else, or is passed twice, gets a variable.

        Raises:
            EditFailed: a call is not passed all of them, or a line holds two calls.
        """
        count = 0
        used = {node.value for node in walk(self._module) if isinstance(node, cst.Name)}

        def change(_: cst.CSTNode, node: cst.CSTNode) -> Changed:
            nonlocal count
            found = calls(node, [callee]) if isinstance(node, cst.SimpleStatementLine) else []
            if not found:
                return node
            if len(found) > 1:
                raise does_not_apply(f"{self.path}: one line calls {callee} twice")
            count += 1
            (call,) = found
            passed = [source_of(argument.value) for argument in call.args]
            lines: list[str] = []
            variables: list[str] = []
            arguments = list(call.args)
            for position, name in enumerate(names):
                argument = argument_of(call, position, name)
                if argument is None:
                    raise does_not_apply(f"{self.path}: {callee} is passed no {name}")
                source = source_of(argument.value)
                if not isinstance(argument.value, cst.Name) or passed.count(source) > 1:
                    while name in used:
                        name += "_"
                    lines.append(f"{name} = {source}")
                    arguments[call.args.index(argument)] = argument.with_changes(
                        value=cst.Name(name)
                    )
                    source = name
                variables.append(source)
            line = cast(
                cst.SimpleStatementLine,
                node.deep_replace(call, call.with_changes(args=arguments)),
            )
            source = "\n".join([*lines, new(variables)])
            if not source.strip():
                return line
            added = statements(source)
            added[0] = added[0].with_changes(
                leading_lines=[*line.leading_lines, *added[0].leading_lines]
            )
            return cst.FlattenSentinel([*added, line.with_changes(leading_lines=[])])

        self._change(change)
        return count

    def set_keywords(self, callee: str, **new: str | None) -> None:
        """Pass other keyword arguments to every call of `callee`; None leaves one out."""

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            if not isinstance(node, cst.Call) or last_name(node.func) != callee:
                return node
            kept = [a for a in node.args if a.keyword is None or a.keyword.value not in new]
            passed = ", ".join(f"{keyword}={value}" for keyword, value in new.items() if value)
            added = list(cast(cst.Call, cst.parse_expression(f"f({passed})")).args)
            comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
            if added:
                # Commas hold the comments on arguments, so those that are there stay.
                kept = [
                    a.with_changes(comma=comma) if isinstance(a.comma, cst.MaybeSentinel) else a
                    for a in kept
                ]
                if node.args and node.args[-1] not in kept:
                    added = [*added[:-1], added[-1].with_changes(comma=node.args[-1].comma)]
            return node.with_changes(args=[*kept, *added])

        self._change(change)

    def prepend(self, method: Method, source: str) -> None:
        """Add statements at the beginning of a method, after its docstring."""
        node = self._method(method)
        block = cast(cst.IndentedBlock, node.body)
        start = 1 if is_docstring(block.body[0]) else 0
        body = [*block.body[:start], *statements(source), *block.body[start:]]
        self._swap(node, node.with_changes(body=block.with_changes(body=body)))

    def before_returns(self, method: Method, source: str) -> int:
        """Add statements before every return of a method; return how many there were."""
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> Changed:
            nonlocal count
            line = isinstance(node, cst.SimpleStatementLine) and node.body[-1]
            if not isinstance(line, cst.Return):
                return node
            count += 1
            return cst.FlattenSentinel([*statements(source), cast(cst.BaseStatement, node)])

        self._change(change, within=self._method(method))
        return count

    def add_method(self, class_name: str, source: str) -> None:
        """Add a method at the end of a top-level class."""
        node = self._class(class_name)
        (new,) = statements(source)
        new = new.with_changes(leading_lines=[cst.EmptyLine(indent=False)])
        body = node.body.with_changes(body=[*node.body.body, new])
        self._swap(node, node.with_changes(body=body))

    def merge_branches(self, class_name: str) -> bool:
        """Let two branches read one norm: `x = x + a(m(x)); x + b(n(x))` -> `x + a(y) + b(y)`.

        Returns whether the class's `forward` was of that form.
        """
        method = (class_name, "forward")
        if not self._has_method(method):
            return False
        added = [
            (node, branch)
            for node in walk(self._method(method))
            if (branch := normalised_branch(node)) is not None
        ]
        first_line = next(
            (
                node
                for node in walk(self._method(method))
                if _is_line(node) and added and added[0][0] in walk(node)
            ),
            None,
        )
        if len(added) != 2 or first_line is None:
            return False
        (_, (x, first, norm)), (old, (x2, second, dropped)) = added
        target = sole_target(first_line)
        if not (isinstance(target, cst.Name) and target.value == x == x2 and norm != dropped):
            return False
        new = cst.parse_expression(f"{x} + self.{first}(normalised) + self.{second}(normalised)")
        (line,) = statements(f"normalised = self.{norm}({x})")

        def change(before: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            if before is first_line:
                return cast(cst.SimpleStatementLine, node).with_changes(
                    body=cast(cst.SimpleStatementLine, line).body
                )
            return new if before is old else node

        self._change(change, within=self._method(method))
        self.drop_attribute(class_name, dropped)
        return True

    def drop_attribute(self, class_name: str, attribute: str) -> None:
        """Remove the assignment of `self.attribute` from a class's `__init__`.

        Raises:
            EditFailed: something else in the class still needs it, such as a method for weights.
        """

        def change(_: cst.CSTNode, node: cst.CSTNode) -> Changed:
            target = sole_target(node)
            if target is not None and own_attribute(target) == attribute:
                return cst.RemoveFromParent()
            return node

        self._change(change, within=self._method((class_name, "__init__")))
        if attribute in map(own_attribute, walk(self._class(class_name))):
            raise does_not_apply(f"{self.path}: {class_name} still needs self.{attribute}")

    # --- the tree -----------------------------------------------------------------------------

    def _before(self, method: Method, where: Callable[[cst.CSTNode], bool], source: str) -> None:
        done = False

        def change(old: cst.CSTNode, node: cst.CSTNode) -> Changed:
            nonlocal done
            if done or not where(old):
                return node
            done = True
            new = statements(source)
            line = cast(cst.SimpleStatementLine, node)
            new[0] = new[0].with_changes(leading_lines=[*line.leading_lines, *new[0].leading_lines])
            return cst.FlattenSentinel([*new, line.with_changes(leading_lines=[])])

        self._change(change, within=self._method(method))
        if not done:
            raise does_not_apply(f"{self.path}: {'.'.join(method)} has no such line")

    def _change(self, change: Change, within: cst.CSTNode | None = None) -> None:
        if within is None:
            self._module = cast(cst.Module, changed(self._module, change))
        else:
            self._swap(within, cast(cst.CSTNode, changed(within, change)))

    def _swap(self, old: cst.CSTNode, new: cst.CSTNode) -> None:
        swapped = changed(self._module, lambda before, after: new if before is old else after)
        self._module = cast(cst.Module, swapped)


def _is_line(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine)
