"""Mutators: what rewrites a genome into its child."""

from darwin_exp.mutation.llm import MUTATOR_FORMS, LanguageModelMutator
from darwin_exp.mutation.none import NoMutation
from darwin_exp.mutation.operators import EDITS, Operators, edit_weights, reapply
from darwin_exp.mutation.prompt import Surroundings
from darwin_exp.mutation.scripted import Scripted, ScriptedStep

__all__ = [
    "EDITS",
    "MUTATOR_FORMS",
    "LanguageModelMutator",
    "NoMutation",
    "Operators",
    "Scripted",
    "ScriptedStep",
    "Surroundings",
    "edit_weights",
    "reapply",
]
