"""The parts of a parsed Python file, found by what they do.

Roles rather than names ("the class that calls scaled_dot_product_attention", "the linear layer
applied last") still fit after other edits or a language model have renamed and moved things.

Reads: the text of one file.
Writes: nothing.
Never: runs the code.
"""

from __future__ import annotations

import libcst as cst

from darwin_exp.mutation.builtin import does_not_apply
from darwin_exp.mutation.syntax import (
    calls,
    has_argument,
    is_self,
    last_name,
    own_call,
    walk,
)

Method = tuple[str, str]  # class, method


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
            self._module = cst.parse_module(text)
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

    def _has_method(self, *methods: Method) -> bool:
        wanted = set(methods)
        for node in self._module.body:
            if isinstance(node, cst.ClassDef):
                for member in node.body.body:
                    if isinstance(member, cst.FunctionDef):
                        wanted.discard((node.name.value, member.name.value))
        return not wanted

    def _method(self, method: Method) -> cst.FunctionDef:
        class_name, name = method
        for node in self._module.body:
            if isinstance(node, cst.ClassDef) and node.name.value == class_name:
                for member in node.body.body:
                    if isinstance(member, cst.FunctionDef) and member.name.value == name:
                        return member
        raise does_not_apply(f"{self.path}: {class_name} has no {name}")
