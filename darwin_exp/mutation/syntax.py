"""Small questions about syntax trees, and the one way in which they are changed.

Reads: nodes of a libcst tree.
Writes: new nodes; a tree is never changed in place.
Never: knows what an edit is for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection
from operator import is_not
from typing import Any, TypeGuard, cast

import libcst as cst

Changed = cst.CSTNode | cst.RemovalSentinel | cst.FlattenSentinel[cst.BaseStatement]
Change = Callable[[cst.CSTNode, cst.CSTNode], Changed]


# Most of a tree is layout, in which nothing is ever looked for; skipping it saves most time.
_LAYOUT = (cst.BaseParenthesizableWhitespace, cst.TrailingWhitespace, cst.EmptyLine, cst.Comma)


class _Matters(dict[type, bool]):
    """Whether nodes of a type are looked at; remembered, since libcst's own check is slow."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = issubclass(kind, cst.CSTNode) and not issubclass(kind, _LAYOUT)
        return self[kind]


_MATTERS = _Matters()


def walk(node: cst.CSTNode) -> list[cst.CSTNode]:
    """Return a node and all below it but layout, outermost first and otherwise as written."""
    found = [node]
    for name in node.__dataclass_fields__:
        value = getattr(node, name)
        for child in value if isinstance(value, list | tuple) else (value,):
            if _MATTERS[type(child)]:
                found += walk(child)
    return found


def changed(node: cst.CSTNode, change: Change) -> Changed:
    """Return a tree in which every node but layout was handed to `change`, children first.

    `change` gets the node as it was and as its children's changes left it; it returns what
    shall stand there. Only a statement may be removed or become several.
    """
    new: dict[str, object] = {}
    for name in node.__dataclass_fields__:
        value = getattr(node, name)
        if isinstance(value, list | tuple):
            children = [part for child in value for part in _parts(child, change)]
            if len(children) != len(value) or any(map(is_not, children, value)):
                new[name] = children
        elif isinstance(value, cst.CSTNode):
            (child,) = _parts(value, change)
            if child is not value:
                new[name] = child
    return change(node, node.with_changes(**new) if new else node)


def _parts(child: Any, change: Change) -> list[Any]:
    if not _MATTERS[type(child)]:
        return [child]
    result = changed(child, change)
    if isinstance(result, cst.RemovalSentinel):
        return []
    return list(result) if isinstance(result, cst.FlattenSentinel) else [result]


def source_of(node: cst.CSTNode) -> str:
    return cst.Module([]).code_for_node(node)


def operand(source: str) -> cst.BaseExpression:
    """Parse an expression, in brackets unless it can stand beside any operator as it is."""
    expression = cst.parse_expression(source)
    if isinstance(expression, cst.Name | cst.Call | cst.Attribute | cst.Subscript):
        return expression
    if expression.lpar:
        return expression
    return expression.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])


def whole_expressions(root: cst.CSTNode) -> set[int]:
    """Return the ids of expressions beside which no operator stands: results, arguments, values."""
    return {
        id(node.value)
        for node in walk(root)
        if isinstance(node, cst.Arg | cst.Assign | cst.AnnAssign | cst.Expr | cst.Return)
    }


def last_name(node: cst.CSTNode) -> str | None:
    if isinstance(node, cst.Attribute):
        return node.attr.value
    return node.value if isinstance(node, cst.Name) else None


def is_self(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Name) and node.value == "self"


def own_attribute(node: cst.CSTNode) -> str | None:
    """Return X if a node is `self.X`."""
    return node.attr.value if isinstance(node, cst.Attribute) and is_self(node.value) else None


def own_call(node: cst.CSTNode) -> str | None:
    """Return X if a node is a call `self.X(...)`."""
    if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute):
        return node.func.attr.value if is_self(node.func.value) else None
    return None


def has_argument(node: cst.CSTNode, name: str) -> bool:
    return isinstance(node, cst.Call) and any(
        isinstance(argument.value, cst.Name) and argument.value.value == name
        for argument in node.args
    )


def argument_of(call: cst.Call, position: int, keyword: str) -> cst.Arg | None:
    """Return the argument of a call that is passed by keyword or at a position."""
    for index, argument in enumerate(call.args):
        if argument.star:
            return None
        name = argument.keyword.value if argument.keyword else None
        if name == keyword or (name is None and index == position):
            return argument
    return None


def calls(root: cst.CSTNode, callees: Collection[str]) -> list[cst.Call]:
    return [
        node
        for node in walk(root)
        if isinstance(node, cst.Call) and last_name(node.func) in callees
    ]


def sole_target(node: cst.CSTNode) -> cst.BaseExpression | None:
    """Return what a line assigns to, if all it does is assign to one thing."""
    if not isinstance(node, cst.SimpleStatementLine) or len(node.body) != 1:
        return None
    statement = node.body[0]
    if isinstance(statement, cst.AnnAssign):
        return statement.target
    if isinstance(statement, cst.Assign) and len(statement.targets) == 1:
        return statement.targets[0].target
    return None


def is_docstring(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine) and (
        isinstance(expression := node.body[0], cst.Expr)
        and isinstance(expression.value, cst.SimpleString | cst.ConcatenatedString)
    )


def is_definition(node: cst.CSTNode, name: str) -> bool:
    return isinstance(node, cst.ClassDef | cst.FunctionDef) and node.name.value == name


def calls_a_method(node: cst.CSTNode) -> bool:
    """Return whether all that a line does is call `x.y(...)`."""
    if not isinstance(node, cst.SimpleStatementLine) or len(node.body) != 1:
        return False
    expression = node.body[0]
    return (
        isinstance(expression, cst.Expr)
        and isinstance(expression.value, cst.Call)
        and isinstance(expression.value.func, cst.Attribute)
    )


def has_comment(node: cst.CSTNode) -> bool:
    lines = getattr(node, "leading_lines", ())
    return any(line.comment is not None for line in lines)


def import_order(source: str) -> tuple[bool, str]:
    source = source.strip()
    return source.startswith("from"), source


def is_import(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine) and isinstance(
        node.body[0], cst.Import | cst.ImportFrom
    )


def argument_of_one_plus_cosine(node: cst.BinaryOperation) -> cst.BaseExpression | None:
    """Return x of `1 + cos(pi * x)`, whichever way round it is written."""
    if not isinstance(node.operator, cst.Add):
        return None
    for one, cosine in ((node.left, node.right), (node.right, node.left)):
        if not (is_number(one, 1) and cosine in calls(cosine, ["cos"])):
            continue
        product = cast(cst.Call, cosine).args[0].value
        if is_product(product):
            for pi, x in ((product.left, product.right), (product.right, product.left)):
                if last_name(pi) == "pi":
                    return x
    return None


def is_product(node: cst.CSTNode) -> TypeGuard[cst.BinaryOperation]:
    return isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Multiply)


def is_number(node: cst.CSTNode, value: float) -> bool:
    return isinstance(node, cst.Integer | cst.Float) and node.evaluated_value == value


def normalised_branch(node: cst.CSTNode) -> tuple[str, str, str] | None:
    """Return (x, branch, norm) if a node is `x + self.branch(self.norm(x))`."""
    if not (isinstance(node, cst.BinaryOperation) and isinstance(node.operator, cst.Add)):
        return None
    x, outer = node.left, node.right
    if not (isinstance(x, cst.Name) and isinstance(outer, cst.Call) and len(outer.args) == 1):
        return None
    inner = outer.args[0].value
    branch, norm = own_call(outer), own_call(inner)
    if branch is None or norm is None or not has_argument(inner, x.value):
        return None
    return x.value, branch, norm


def bare_names(node: cst.CSTNode) -> set[str]:
    """Return the names that stand for themselves below a node: x of `x[0]`, not of `x.shape`."""
    below = walk(node)
    owners = {id(n.value) for n in below if isinstance(n, cst.Attribute)}
    parts = {id(n.attr) for n in below if isinstance(n, cst.Attribute)}
    return {n.value for n in below if isinstance(n, cst.Name) and id(n) not in owners | parts}


def statements(source: str) -> list[cst.SimpleStatementLine | cst.BaseCompoundStatement]:
    parsed = cst.parse_module(textwrap.dedent(source).strip() + "\n")
    first, *rest = cast(
        "list[cst.SimpleStatementLine | cst.BaseCompoundStatement]", list(parsed.body)
    )
    # A comment at the very top belongs to the module's header; give it to the first statement.
    return [first.with_changes(leading_lines=[*parsed.header, *first.leading_lines]), *rest]


def key_of(node: cst.CSTNode) -> str | None:
    """Return the text k of `X["k"]`."""
    if not isinstance(node, cst.Subscript) or len(node.slice) != 1:
        return None
    index = node.slice[0].slice
    if isinstance(index, cst.Index) and isinstance(index.value, cst.SimpleString):
        return str(index.value.evaluated_value)
    return None


def unpacked_pair(node: cst.CSTNode) -> tuple[str, str] | None:
    """Return the two variables that an assignment unpacks a call into."""
    if not isinstance(node, cst.Assign) or len(node.targets) != 1:
        return None
    target = node.targets[0].target
    if not isinstance(target, cst.Tuple) or not isinstance(node.value, cst.Call):
        return None
    names = [
        element.value.value for element in target.elements if isinstance(element.value, cst.Name)
    ]
    return (names[0], names[1]) if len(names) == len(target.elements) == 2 else None
