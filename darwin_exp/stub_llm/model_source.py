"""Places in model.py at which changes are made, whatever else has been changed before.

Reads: the source of model.py.
Writes: new source.
Never: goes by line numbers or layout; a place that cannot be told for sure does not fit.
"""

from __future__ import annotations

import ast

from darwin_exp.stub_llm.source import (
    DoesNotFit,
    absent,
    calls,
    function,
    insert_after,
    insert_before,
    model_class,
    parse,
    segment,
    sole,
    spliced,
    statement_around,
)

ATTENTION = "scaled_dot_product_attention"


def normalised_queries_and_keys(text: str) -> str:
    """Return a model whose queries and keys have unit size a channel."""
    absent(text, "normalise_heads")
    query, key = queries_and_keys(text)
    absent(text, f"{query} = F.rms_norm({query}")
    return before_attention(
        text,
        f"""
        # Heads of unit size bound the scores, whatever the weights grow to.
        {query} = F.rms_norm({query}, ({query}.size(-1),))
        {key} = F.rms_norm({key}, ({key}.size(-1),))
        """,
    )


def at_end_of_init(text: str, code: str) -> str:
    """Return a model whose constructor does something more, with `config` at hand."""
    init = function(model_class(parse(text)), "__init__")
    if [argument.arg for argument in init.args.args] != ["self", "config"]:
        raise DoesNotFit("the model is not made from a config")
    return insert_after(text, init.body[-1], code)


def queries_and_keys(text: str) -> tuple[str, str]:
    call = sole(calls(parse(text), ATTENTION), "calls of attention")
    names = [argument.id for argument in call.args[:2] if isinstance(argument, ast.Name)]
    if len(names) != 2:
        raise DoesNotFit("cannot tell queries from keys")
    return names[0], names[1]


def before_attention(text: str, code: str) -> str:
    tree = parse(text)
    call = sole(calls(tree, ATTENTION), "calls of attention")
    return insert_before(text, statement_around(tree, call), code)


def before_blocks(text: str, code: str) -> str:
    """Insert lines before the loop through the blocks, with their stream called {x}."""
    forward = function(model_class(parse(text)), "forward")
    loop = sole([node for node in forward.body if isinstance(node, ast.For)], "loops in forward")
    step = sole(loop.body, "statements in the loop")
    if not (isinstance(step, ast.Assign) and isinstance(step.targets[0], ast.Name)):
        raise DoesNotFit("the loop through the blocks is another one")
    return insert_before(text, loop, code.format(x=step.targets[0].id))


def with_logits(text: str, template: str) -> str:
    """Return a model that does something to its logits: {x} in an expression."""
    forward = function(model_class(parse(text)), "forward")
    results = [n.value for n in ast.walk(forward) if isinstance(n, ast.Return) and n.value]
    if not results:
        raise DoesNotFit("the model returns nothing")
    alone = (ast.Name, ast.Call, ast.Attribute)
    sources = [
        segment(text, node) if isinstance(node, alone) else f"({segment(text, node)})"
        for node in results
    ]
    new = [(node, template.format(x=x)) for node, x in zip(results, sources, strict=True)]
    return spliced(text, *new)
