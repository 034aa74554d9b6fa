"""Mutators: what rewrites a genome into its child."""

from darwin_exp.mutation.none import NoMutation
from darwin_exp.mutation.operators import EDITS, Operators, edit_weights, reapply
from darwin_exp.mutation.scripted import Scripted, ScriptedStep

__all__ = [
    "EDITS",
    "NoMutation",
    "Operators",
    "Scripted",
    "ScriptedStep",
    "edit_weights",
    "reapply",
]
