"""The training loop under edit: what plays which part in it, and what is put beside it.

A training script is known by what it must do: it builds a model and calls `build_model` for that,
steps an optimizer, differentiates a loss, draws batches, saves weights, and stops after the job's
`max_steps`. Its names, and the order of its functions, are its own affair.

Reads: the text of one file.
Writes: the changed tree.
Never: runs the code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import cast

import libcst as cst

from darwin_exp.mutation.builtin import does_not_apply
from darwin_exp.mutation.layers import Layers
from darwin_exp.mutation.syntax import (
    calls,
    calls_a_method,
    has_comment,
    key_of,
    last_name,
    sole_target,
    source_of,
    statements,
    unpacked_pair,
    walk,
)

_Line = cst.SimpleStatementLine | cst.BaseCompoundStatement


class Loop(Layers):
    """One Python file whose training loop can be asked about and added to."""

    # --- asking -------------------------------------------------------------------------------

    def made_from(self, callee: str) -> str:
        """Return the top-level variable whose value comes from a call of `callee`.

        Raises:
            EditFailed: there is none.
        """
        for line in self._module.body:
            target, value = sole_target(line), _value_of(line)
            if isinstance(target, cst.Name) and value is not None and calls(value, [callee]):
                return target.value
        raise does_not_apply(f"{self.path}: no top-level variable comes from {callee}")

    def optimizer(self) -> str:
        """Return the top-level variable whose `step` the script calls.

        Raises:
            EditFailed: there is none.
        """
        variables = {
            t.value for t in map(sole_target, self._module.body) if isinstance(t, cst.Name)
        }
        for call in calls(self._training(), ["step"]):
            if isinstance(call.func, cst.Attribute) and last_name(call.func.value) in variables:
                return source_of(call.func.value)
        raise does_not_apply(f"{self.path}: no optimizer of the top level is stepped in a loop")

    def job_value(self, key: str) -> str:
        """Return the top-level variable that holds a value of the job file.

        Raises:
            EditFailed: there is none.
        """
        for line in self._module.body:
            target, value = sole_target(line), _value_of(line)
            if isinstance(target, cst.Name) and value is not None and key_of(value) == key:
                return target.value
        raise does_not_apply(f"{self.path}: no top-level variable holds the job's {key}")

    def progress(self) -> str:
        """Return the variable that runs from 0 to 1: what steps over `max_steps` are assigned to.

        Raises:
            EditFailed: there is none.
        """
        most = self.job_value("max_steps")
        for node in walk(self._training()):
            value = _value_of(node)
            if isinstance(value, cst.BinaryOperation) and isinstance(value.operator, cst.Divide):
                target = sole_target(node)
                if last_name(value.right) == most and isinstance(target, cst.Name):
                    return target.value
        raise does_not_apply(f"{self.path}: no variable holds the share of steps done")

    def batch_variables(self) -> tuple[str, str]:
        """Return the two variables, inputs and targets, that the loop unpacks its batches into.

        Raises:
            EditFailed: it unpacks no call, or unlike ones, into two variables.
        """
        pairs = {pair for n in walk(self._training()) if (pair := unpacked_pair(n)) is not None}
        if len(pairs) != 1:
            raise does_not_apply(f"{self.path}: cannot tell where the loop gets its batches")
        return pairs.pop()

    def functions_calling(self, *callees: str) -> list[str]:
        """Return the top-level functions in which any of these is called, in order."""
        return [
            node.name.value
            for node in self._module.body
            if isinstance(node, cst.FunctionDef) and calls(node, callees)
        ]

    # --- adding -------------------------------------------------------------------------------

    def define_before_use(self, name: str, source: str) -> None:
        """Add top-level definitions before the first top-level statement that reads `name`.

        Raises:
            EditFailed: nothing reads it.
        """
        for position, node in enumerate(self._module.body):
            if any(last_name(n) == name for n in walk(node) if isinstance(n, cst.Name)):
                self._define_at(position, source)
                return
        raise does_not_apply(f"{self.path}: nothing reads {name}")

    def define_before_making(self, variable: str, source: str) -> None:
        """Add top-level definitions before the first top-level line that assigns to `variable`.

        Raises:
            EditFailed: none does.
        """
        self._define_at(self._position_of_making(variable), source)

    def _define_at(self, position: int, source: str) -> None:
        gap = [cst.EmptyLine(indent=False), cst.EmptyLine(indent=False)]
        new = statements(source)
        new[0] = new[0].with_changes(leading_lines=[*gap, *new[0].leading_lines])
        body = list(self._module.body)
        old = body[position]
        if has_comment(old):
            # A heading above a statement is one for what is put before it, too.
            new[0] = new[0].with_changes(leading_lines=old.leading_lines)
            old = old.with_changes(leading_lines=gap)
        elif not isinstance(old, cst.FunctionDef | cst.ClassDef):
            old = old.with_changes(leading_lines=gap)
        body[position : position + 1] = [*new, old]
        self._module = self._module.with_changes(body=body)

    def after_making(self, variable: str, source: str) -> None:
        """Add top-level statements after the first one that assigns to `variable`.

        Raises:
            EditFailed: none does.
        """
        position = self._position_of_making(variable) + 1
        body = [*self._module.body[:position], *statements(source), *self._module.body[position:]]
        self._module = self._module.with_changes(body=body)

    def before_training(self, source: str) -> None:
        """Add top-level statements before the loop that trains.

        Raises:
            EditFailed: there is none at the top level.
        """
        loop = self._training()
        new = statements(source)
        new[0] = new[0].with_changes(leading_lines=[*loop.leading_lines, *new[0].leading_lines])
        position = list(self._module.body).index(loop)
        body = [*self._module.body[:position], *new, *self._module.body[position:]]
        self._module = self._module.with_changes(body=body)

    def beside_step(self, before: str = "", after: str = "", late: bool = False) -> None:
        """Add statements before and after the line in which the optimizer steps.

        With `late` the latter come after all method calls right below that line, which complete
        the step: a correction of it, say, or `zero_grad`.

        Raises:
            EditFailed: there is no such line of its own.
        """
        optimizer = self.optimizer()

        def steps(call: cst.Call) -> bool:
            return source_of(call.func) == f"{optimizer}.step"

        self._beside_lines_calling("step", steps, before, after, late)

    def after_backward(self, source: str) -> None:
        """Add statements after every line of the loop in which the loss is differentiated.

        Raises:
            EditFailed: there is no such line.
        """
        self._beside_lines_calling("backward", lambda _: True, "", source)

    # --- changing -----------------------------------------------------------------------------

    def call_instead(
        self, callees: Collection[str], new: str, n_positional: int | None = None
    ) -> int:
        """Call `new` with all the arguments of every call of these; return how many there were.

        With `n_positional`, calls with another number of positional arguments stay.
        """

        def replace(call: cst.Call) -> cst.Call | None:
            positional = [a for a in call.args if a.keyword is None and not a.star]
            if n_positional not in (None, len(positional)):
                return None
            return call.with_changes(func=_parsed(new))

        return self._change_calls(callees, replace)

    def call_at_top_instead(self, callee: str, new: str) -> int:
        """Call `new` where `callee` is called outside of functions; return how often it was.

        Raises:
            EditFailed: it is called with arguments.
        """
        count = 0
        definitions = [
            n for n in self._module.body if isinstance(n, cst.FunctionDef | cst.ClassDef)
        ]
        inside = {id(node) for definition in definitions for node in walk(definition)}

        def change(before: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if not isinstance(node, cst.Call) or last_name(node.func) != callee:
                return node
            if id(before) in inside:
                return node
            if node.args:
                raise does_not_apply(f"{self.path}: {callee} takes arguments")
            count += 1
            return node.with_changes(func=_parsed(new))

        self._change(change)
        return count

    def add_keyword(self, callees: Collection[str], keyword: str, value: str) -> int:
        """Pass one more keyword to every call of these that does not pass it; return how many."""

        def add(call: cst.Call) -> cst.Call | None:
            if any(a.keyword is not None and a.keyword.value == keyword for a in call.args):
                return None
            (extra,) = cast(cst.Call, _parsed(f"f({keyword}={value})")).args
            comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
            earlier = [
                a.with_changes(comma=comma) if isinstance(a.comma, cst.MaybeSentinel) else a
                for a in call.args
            ]
            return call.with_changes(args=[*earlier, extra])

        return self._change_calls(callees, add)

    def replace_arguments(self, callee: str, position: int, new: Callable[[str], str]) -> int:
        """Replace the argument at a position in every call of `callee`; return how many."""

        def replace(call: cst.Call) -> cst.Call | None:
            if position >= len(call.args) or call.args[position].star:
                return None
            argument = call.args[position]
            changed = argument.with_changes(value=_parsed(new(source_of(argument.value))))
            args = [*call.args[:position], changed, *call.args[position + 1 :]]
            return call.with_changes(args=args)

        return self._change_calls([callee], replace)

    def replace_value(self, key: str, new: str) -> int:
        """Replace the value that dictionaries written out hold under a key; return how many."""
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if not isinstance(node, cst.DictElement) or not isinstance(node.key, cst.SimpleString):
                return node
            if node.key.evaluated_value != key:
                return node
            count += 1
            return node.with_changes(value=_parsed(new))

        self._change(change)
        return count

    def scale_assigned(self, key: str, factor: Callable[[str], str]) -> int:
        """Multiply what is assigned to `X["key"]` by a factor made from X; return how often."""
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if not isinstance(node, cst.Assign) or len(node.targets) != 1:
                return node
            target = node.targets[0].target
            if not isinstance(target, cst.Subscript) or key_of(target) != key:
                return node
            count += 1
            value = source_of(node.value)
            if not isinstance(node.value, cst.Name | cst.Call | cst.Attribute | cst.Subscript):
                value = f"({value})"
            return node.with_changes(value=_parsed(f"{value} * {factor(source_of(target.value))}"))

        self._change(change)
        return count

    def wrap_batches(self, wrap: Callable[[str, bool], str]) -> None:
        """Pass every batch through an expression of its source and whether training has begun.

        Raises:
            EditFailed: it cannot be told where the loop gets its batches.
        """
        pair = self.batch_variables()
        within = {id(node) for node in walk(self._training())}

        def change(before: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            if isinstance(node, cst.Assign) and unpacked_pair(node) == pair:
                return node.with_changes(
                    value=_parsed(wrap(source_of(node.value), id(before) in within))
                )
            return node

        self._change(change)

    # --- the tree -----------------------------------------------------------------------------

    def _position_of_making(self, variable: str) -> int:
        for position, line in enumerate(self._module.body):
            target = sole_target(line)
            if isinstance(target, cst.Name) and target.value == variable:
                return position
        raise does_not_apply(f"{self.path}: {variable} is made nowhere at the top level")

    def _training(self) -> cst.While | cst.For:
        for node in self._module.body:
            if isinstance(node, cst.While | cst.For) and calls(node, ["backward"]):
                return node
        raise does_not_apply(f"{self.path}: no loop of the top level differentiates a loss")

    def _change_calls(
        self, callees: Collection[str], new: Callable[[cst.Call], cst.Call | None]
    ) -> int:
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if isinstance(node, cst.Call) and last_name(node.func) in callees:
                call = new(node)
                if call is not None:
                    count += 1
                    return call
            return node

        self._change(change)
        return count

    def _beside_lines_calling(
        self,
        callee: str,
        wanted: Callable[[cst.Call], bool],
        before: str,
        after: str,
        late: bool = False,
    ) -> None:
        count = 0

        def change(_: cst.CSTNode, node: cst.CSTNode) -> cst.CSTNode:
            nonlocal count
            if not isinstance(node, cst.IndentedBlock):
                return node
            lines: list[cst.BaseStatement] = []
            waiting: Sequence[_Line] = []
            for line in node.body:
                if not (late and calls_a_method(line)):
                    lines += waiting
                    waiting = []
                found = isinstance(line, cst.SimpleStatementLine) and any(
                    map(wanted, calls(line, [callee]))
                )
                if found:
                    count += 1
                    lines += statements(before) if before else []
                    waiting = statements(after) if after else []
                lines.append(line)
            return node.with_changes(body=[*lines, *waiting])

        self._change(change, within=self._training())
        if not count:
            raise does_not_apply(f"{self.path}: no line of the training loop calls {callee}")


def _parsed(source: str) -> cst.BaseExpression:
    return cst.parse_expression(source)


def _value_of(node: cst.CSTNode) -> cst.BaseExpression | None:
    """Return the value of a line that only assigns to one thing."""
    if sole_target(node) is None:
        return None
    statement = cast(cst.SimpleStatementLine, node).body[0]
    return cast("cst.Assign | cst.AnnAssign", statement).value
