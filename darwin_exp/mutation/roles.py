"""The parts of a parsed Python file, found by what they do.

Roles rather than names ("the class that calls scaled_dot_product_attention", "the linear layer
applied last") still fit after other edits or a language model have renamed and moved things.

Reads: the text of one file.
Writes: nothing.
Never: runs the code.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import libcst as cst

from darwin_exp.mutation.builtin import does_not_apply
from darwin_exp.mutation.syntax import (
    argument_of,
    bare_names,
    calls,
    has_argument,
    is_product,
    is_self,
    last_name,
    own_attribute,
    own_call,
    sole_target,
    source_of,
    walk,
)

Method = tuple[str, str]  # class, method


@lru_cache(maxsize=32)
def _parsed(text: str) -> cst.Module:
    """Parse a file; many edits begin from the same text, and a tree is never changed in place."""
    return cst.parse_module(text)


class Roles:
    """One parsed Python file and what plays which part in it.

    Args:
        text: the file's content.
        path: its name, for messages.

    Raises:
        EditFailed: the text does not parse.
    """

    def __init__(self, text: str, path: str) -> None:
        self.path = path
        try:
            self._module = _parsed(text)
        except cst.ParserSyntaxError as error:
            raise does_not_apply(f"{path} does not parse: {error.message}") from error

    @property
    def text(self) -> str:
        return self._module.code

    def defines(self, name: str) -> bool:
        """Return whether the file has a class or function of this name at its top level."""
        return any(
            isinstance(node, cst.ClassDef | cst.FunctionDef) and node.name.value == name
            for node in self._module.body
        )

    def uses(self, name: str, within: Method | None = None) -> bool:
        """Return whether a name or attribute is read or called anywhere in the file or method."""
        root = self._method(within) if within else self._module
        return any(
            last_name(node) == name
            for node in walk(root)
            if isinstance(node, cst.Name | cst.Attribute)
        )

    def classes_calling(self, *callees: str) -> list[str]:
        """Return the top-level classes in which any of these is called, in order."""
        return [
            node.name.value
            for node in self._module.body
            if isinstance(node, cst.ClassDef) and calls(node, callees)
        ]

    def model_class(self) -> str:
        """Return the class of the whole model: the one that owns the token embedding.

        Raises:
            EditFailed: no class makes an Embedding.
        """
        for name in self.classes_calling("Embedding"):
            return name
        raise does_not_apply(f"{self.path}: no class makes an nn.Embedding")

    def attributes_made_by(self, class_name: str, *callees: str) -> list[str]:
        """Return the attributes that a class's `__init__` assigns from calls of these."""
        return [
            target.attr.value
            for node in walk(self._method((class_name, "__init__")))
            if isinstance(node, cst.Assign)
            and isinstance(node.value, cst.Call)
            and last_name(node.value.func) in callees
            and isinstance(target := node.targets[0].target, cst.Attribute)
            and is_self(target.value)
        ]

    def last_linear(self, class_name: str) -> str | None:
        """Return the attribute of the linear layer that a class's `forward` applies last."""
        if not self._has_method((class_name, "__init__"), (class_name, "forward")):
            return None
        linears = set(self.attributes_made_by(class_name, "Linear"))
        forward = self._method((class_name, "forward"))
        last = None
        for line in (node for node in walk(forward) if isinstance(node, cst.SimpleStatementLine)):
            # Of nested calls the outermost comes first in the tree and is applied last.
            last = next((n for n in map(own_call, walk(line)) if n in linears), last)
        return last

    def parameter_of(self, method: Method, index: int = 1) -> str:
        """Return the name of a method's parameter, 0 being self."""
        parameters = self._method(method).params.params
        if index >= len(parameters):
            raise does_not_apply(f"{self.path}: {'.'.join(method)} takes too few parameters")
        return parameters[index].name.value

    def calls_own_with(self, method: Method, attribute: str, argument: str) -> bool:
        """Return whether a method calls `self.attribute(argument)`."""
        return any(
            own_call(node) == attribute and has_argument(node, argument)
            for node in walk(self._method(method))
        )

    def receiver_of(self, called: str) -> str | None:
        """Return the name X of the first call `X.called(...)` in the file."""
        for call in calls(self._module, [called]):
            if isinstance(call.func, cst.Attribute) and isinstance(call.func.value, cst.Name):
                return call.func.value.value
        return None

    def top_level_definition_calling(self, callee: str) -> str | None:
        """Return the first top-level function or class in which this is called."""
        for node in self._module.body:
            if isinstance(node, cst.ClassDef | cst.FunctionDef) and calls(node, [callee]):
                return node.name.value
        return None

    # --- layers: attributes that `__init__` makes and a method calls ---------------------------

    def branch_classes(self) -> dict[str, str]:
        """Return the parts of a block (attention, the MLP), each with its last linear layer."""
        model = self.model_class()
        return {
            name: linear
            for name in self.classes_calling("Linear")
            if name != model and (linear := self.last_linear(name)) is not None
        }

    def made_with(self, class_name: str, attribute: str, position: int, keyword: str) -> str | None:
        """Return an argument's source in `self.attribute = X(...)`, or None if there is no such."""
        call = self._made(class_name, attribute)
        argument = call and argument_of(call, position, keyword)
        return source_of(argument.value) if argument else None

    def assigned_first(self, class_name: str, first: str, second: str) -> bool:
        """Return whether `__init__` assigns `self.first` before it assigns `self.second`."""
        order = [
            own_attribute(node)
            for node in map(sole_target, walk(self._method((class_name, "__init__"))))
            if node is not None
        ]
        return first in order and second in order and order.index(first) < order.index(second)

    def own_arguments_of(self, method: Method, *callees: str) -> list[str]:
        """Return X of every `self.X` that a method passes to calls of these."""
        return [
            attribute
            for call in calls(self._method(method), callees)
            for argument in call.args
            if (attribute := own_attribute(argument.value)) is not None
        ]

    def passed_to(self, callee: str) -> list[str]:
        """Return the first argument of every call of `callee` in the file, as source."""
        return [source_of(c.args[0].value) for c in calls(self._module, [callee]) if c.args]

    def layers_behind(self, method: Method, variable: str) -> set[str]:
        """Return X of all calls `self.X(...)` that a method's variable was computed with."""
        lines = self._lines_behind(method, {variable})
        return {layer for line in lines for layer in map(own_call, walk(line)) if layer is not None}

    def layer_around(self, method: Method, attribute: str) -> str:
        """Return the outermost X of `self.X(self.Y(self.attribute(...)))`; it may be itself."""
        for node in walk(self._method(method)):
            outer = own_call(node)
            if outer is not None and attribute in (
                own_call(argument.value) for argument in cast(cst.Call, node).args
            ):
                return self.layer_around(method, outer)
        return attribute

    def computes_layer_from(self, method: Method, attribute: str, variable: str) -> bool:
        """Return whether a call `self.attribute(...)` is passed what a variable holds.

        What is computed from the variable counts, too; its shape or device alone does not.
        """
        given = {
            name
            for node in walk(self._method(method))
            if own_call(node) == attribute
            for name in bare_names(node)
        }
        behind = {name for line in self._lines_behind(method, given) for name in bare_names(line)}
        return variable in given | behind

    @staticmethod
    def numbered_product(source: str) -> tuple[str, int, str] | None:
        """Return the first product with a whole number in an expression, as (all, number, rest)."""
        for node in walk(cst.parse_expression(source)):
            if is_product(node):
                for number, rest in ((node.left, node.right), (node.right, node.left)):
                    if isinstance(number, cst.Integer):
                        return source_of(node), number.evaluated_value, source_of(rest)
        return None

    def keyword_of(self, callee: str, keyword: str) -> str | None:
        """Return what the first call of `callee` passes by keyword, as source."""
        for call in calls(self._module, [callee]):
            argument = argument_of(call, len(call.args), keyword)
            return source_of(argument.value) if argument else None
        return None

    def loop_over(self, method: Method, attribute: str) -> tuple[str, str] | None:
        """Return the names (x, item) of a loop `for item in self.attribute: x = item(x)`."""
        loop = self._loop(method, attribute)
        names = loop and [n.value for n in walk(loop.target) if isinstance(n, cst.Name)]
        for line in walk(loop.body) if loop and names else ():
            target = sole_target(line)
            if isinstance(target, cst.Name):
                for call in calls(line, names or ()):
                    if call.args and source_of(call.args[0].value) == target.value:
                        return target.value, source_of(call.func)
        return None

    # --- the tree -----------------------------------------------------------------------------

    def _lines_behind(self, method: Method, names: set[str]) -> list[cst.CSTNode]:
        """Return the lines of a method in which these variables, or those they need, are set."""
        lines = [
            (node, {source_of(part) for part in _unpacked(target)})
            for node in walk(self._method(method))
            if (target := sole_target(node)) is not None
        ]
        seen, waiting, found = set[str](), set(names), list[cst.CSTNode]()
        while waiting - seen:
            name = (waiting - seen).pop()
            seen.add(name)
            for line, targets in lines:
                if name in targets:
                    found.append(line)
                    waiting |= bare_names(line)
        return found

    def _made(self, class_name: str, attribute: str) -> cst.Call | None:
        """Return the call in `self.attribute = X(...)`."""
        for node in walk(self._method((class_name, "__init__"))):
            target = sole_target(node)
            if target is not None and own_attribute(target) == attribute:
                (statement,) = cast(cst.SimpleStatementLine, node).body
                value = cast(cst.Assign | cst.AnnAssign, statement).value
                return value if isinstance(value, cst.Call) else None
        return None

    def _loop(self, method: Method, attribute: str) -> cst.For | None:
        for node in walk(self._method(method)):
            if isinstance(node, cst.For) and attribute in map(own_attribute, walk(node.iter)):
                return node
        return None

    def _has_method(self, *methods: Method) -> bool:
        wanted = set(methods)
        for node in self._module.body:
            if isinstance(node, cst.ClassDef):
                for member in node.body.body:
                    if isinstance(member, cst.FunctionDef):
                        wanted.discard((node.name.value, member.name.value))
        return not wanted

    def _class(self, name: str) -> cst.ClassDef:
        for node in self._module.body:
            if isinstance(node, cst.ClassDef) and node.name.value == name:
                return node
        raise does_not_apply(f"{self.path} defines no {name}")

    def _method(self, method: Method) -> cst.FunctionDef:
        class_name, name = method
        for member in self._class(class_name).body.body:
            if isinstance(member, cst.FunctionDef) and member.name.value == name:
                return member
        raise does_not_apply(f"{self.path}: {class_name} has no {name}")


def _unpacked(target: cst.BaseExpression) -> list[cst.BaseExpression]:
    if isinstance(target, cst.Tuple | cst.List):
        return [element.value for element in target.elements]
    return [target]
