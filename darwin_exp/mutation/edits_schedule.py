"""Built-in edits of how the learning rate falls.

Each puts another shape in the place of half a cosine and leaves the warm-up alone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import BuiltInEdit, Parameters, does_not_apply
from darwin_exp.mutation.training import TrainingEdit

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code


class _CoolDown(TrainingEdit):
    """Holds the peak rate and lets it fall over the last part of the schedule."""

    about = "schedule"
    line: ClassVar[str]  # the shape of the fall, in words

    @abstractmethod
    def factor(self, cooldown: float) -> str:
        """Return the factor on the rate, where `{}` is the progress since the warm-up, 0 to 1."""

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        shape = self.factor(float(parameters["cooldown"]))
        if not code.replace_half_cosine(lambda progress: shape.format(progress)):
            raise does_not_apply(f"{self.name}: the schedule holds no half cosine")
        code.need("math")
        code.reword("half a cosine down", self._words(parameters))

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"schedule: {self._words(parameters)}"

    def _words(self, parameters: Parameters) -> str:
        cooldown = float(parameters["cooldown"])
        if cooldown >= 1:
            return f"{self.line} down"
        return f"a plateau and {self.line} down over the last {cooldown:.0%}"


class Trapezoid(_CoolDown):
    """Source: Zhai et al. 2022, "Scaling Vision Transformers"; Hu et al. 2024, "MiniCPM"."""

    name = "trapezoid"
    title = "flat rate with a linear cool-down"
    why = "Holding the peak rate and cooling down late learns more from a short budget."
    hope = "lower final loss"
    choices: ClassVar = {"cooldown": (0.3, 0.5, 0.7, 1.0)}
    line = "a straight line"

    def factor(self, cooldown: float) -> str:
        return f"min(1.0, (1.0 - {{}}) / {cooldown})" if cooldown < 1 else "(1.0 - {})"


class SquareRootCoolDown(_CoolDown):
    """Source: Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed ..."."""

    name = "sqrt_cooldown"
    title = "flat rate with a steep-first cool-down"
    why = "A rate that drops fast and then creeps down spends the cool-down at low rates."
    hope = "lower final loss than a straight line of the same length"
    choices: ClassVar = {"cooldown": (0.2, 0.3, 0.5, 0.7)}
    line = "one minus a square root"

    def factor(self, cooldown: float) -> str:
        return f"(1.0 - math.sqrt(max(0.0, 1.0 - (1.0 - {{}}) / {cooldown})))"


SCHEDULE_EDITS: tuple[BuiltInEdit, ...] = (Trapezoid(), SquareRootCoolDown())
