"""What a rewritten genome must pass before a second of training is spent on it."""

from __future__ import annotations

import json

from darwin_exp.genome import parse_python
from darwin_exp.individual import Genome, Reason


def objection(genome: Genome, parent: Genome) -> tuple[Reason, str] | None:
    """Return why a rewrite cannot be trained, or None if it can.

    Args:
        genome: the rewritten code.
        parent: the code it was made from, which must not be the same but for comments and seeds.
    """
    for path, text in genome.files:
        try:
            if path.endswith(".py"):
                parse_python(text)
            elif path.endswith(".json"):
                json.loads(text)
        except (SyntaxError, ValueError, RecursionError) as error:
            return Reason.SYNTAX, f"{path} does not parse: {error}"
    for needed in ("train.py", "model.py"):
        if needed not in genome.as_dict:
            return Reason.CONTRACT, f"{needed} is gone (see CONTRACT.md)"
    if genome.fingerprint == parent.fingerprint:
        return Reason.NO_OP, "nothing changed but comments, layout or a seed"
    return None
