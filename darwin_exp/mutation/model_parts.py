"""The parts of a GPT that edits of model.py look for, and what several of them do to those.

Reads: a model.py under edit.
Writes: the same.
Never: relies on a name where a role will do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from darwin_exp.mutation.builtin import CodeEdit, does_not_apply
from darwin_exp.protocols import EditFailed

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code

ATTENTION = "scaled_dot_product_attention"
ATTENTION_READS = ("query", "key", "value")


class ModelEdit(CodeEdit):
    """A rewrite of model.py."""

    file = "model.py"

    def refuse(self, why: str) -> EditFailed:
        """Return the exception that says why this edit does not fit."""
        return does_not_apply(f"{self.name}: {why}")

    def attention_class(self, code: Code) -> str:
        """Return the first class that calls torch's attention.

        Raises:
            EditFailed: none does.
        """
        for name in code.classes_calling(ATTENTION):
            return name
        raise self.refuse(f"no class calls {ATTENTION}")

    def branches(self, code: Code) -> dict[str, str]:
        """Return the classes of a block's parts, each with its last linear layer.

        Raises:
            EditFailed: there are none.
        """
        branches = code.branch_classes()
        if not branches:
            raise self.refuse("no block part ends in a linear layer")
        return branches

    def mlp(self, code: Code) -> tuple[str, str, str, str]:
        """Return the MLP's class, its first and last linear layer, and its hidden width's source.

        Raises:
            EditFailed: there is no class with two linear layers of a common hidden width.
        """
        for name, last in self.branches(code).items():
            hidden = code.made_with(name, last, 0, "in_features")
            if hidden is None or name in code.classes_calling(ATTENTION):
                continue
            for first in code.attributes_made_by(name, "Linear"):
                if first != last and code.made_with(name, first, 1, "out_features") == hidden:
                    return name, first, last, hidden
        raise self.refuse("no MLP with a hidden layer of its own")

    def token_embedding(self, code: Code, model: str) -> str:
        """Return the attribute of the model that holds the token embedding.

        Raises:
            EditFailed: no embedding is called with the tokens.
        """
        tokens = code.parameter_of((model, "forward"))
        for attribute in code.attributes_made_by(model, "Embedding"):
            if code.calls_own_with((model, "forward"), attribute, tokens):
                return attribute
        raise self.refuse("no embedding is looked up by the tokens")

    def block_loop(self, code: Code, model: str) -> tuple[str, str]:
        """Return the list of blocks' attribute and the variable that runs through them.

        Raises:
            EditFailed: the model does not loop over a list of blocks.
        """
        for attribute in code.attributes_made_by(model, "ModuleList"):
            names = code.loop_over((model, "forward"), attribute)
            if names is not None:
                return attribute, names[0]
        raise self.refuse("the model does not loop over a list of blocks")

    def wrap_queries_and_keys(self, code: Code, function: str) -> None:
        """Pass what attention compares, each (B, H, T, D), through a function first.

        Raises:
            EditFailed: a call of torch's attention is written in some other way.
        """
        wrapped = code.wrap_arguments(ATTENTION, ("query", "key"), lambda x: f"{function}({x})")
        if not wrapped or wrapped % 2:
            raise self.refuse("cannot tell queries and keys")

    def drop_learned_positions(self, code: Code, instead: str) -> None:
        """Remove the position embedding that is added to the tokens'.

        Raises:
            EditFailed: there is none.
        """
        model = code.model_class()
        tokens = code.parameter_of((model, "forward"))
        learned = [
            attribute
            for attribute in code.attributes_made_by(model, "Embedding")
            if not code.computes_layer_from((model, "forward"), attribute, tokens)
        ]
        if len(learned) != 1 or not code.drop_added_call((model, "forward"), learned[0]):
            raise self.refuse("no learned positions are added to the tokens")
        code.drop_attribute(model, learned[0])
        code.reword("learned positions", instead)
