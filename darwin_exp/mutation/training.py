"""What all edits of the training loop are: rewrites of train.py with drawn parameters.

Reads: the genome it is given.
Writes: a new genome.
Never: the job file, the checkpoints' names, or the seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, ClassVar

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import CodeEdit


class TrainingEdit(CodeEdit):
    """A rewrite of train.py.

    Attributes:
        choices: what each parameter is drawn from.
    """

    file = "train.py"
    choices: ClassVar[Mapping[str, Sequence[Any]]] = {}

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {name: rng.choice(values) for name, values in self.choices.items()}
