"""Built-in edits of the training loop: how the rate falls, and what makes a step.

Each rewrites train.py only and leaves the job file, the checkpoints and the seed alone.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import BuiltInEdit, CodeEdit, Parameters, does_not_apply

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code


class TrainingEdit(CodeEdit):
    """A rewrite of train.py."""

    file = "train.py"


class Trapezoid(TrainingEdit):
    """Source: Zhai et al. 2022, "Scaling Vision Transformers"; Hu et al. 2024, "MiniCPM"."""

    name = "trapezoid"
    about = "schedule"
    title = "flat rate with a linear cool-down"
    why = "Holding the peak rate and cooling down late learns more from a short budget."
    hope = "lower final loss"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"cooldown": rng.choice([0.3, 0.5, 0.7, 1.0])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        cooldown = float(parameters["cooldown"])
        shape = f"min(1.0, (1.0 - {{}}) / {cooldown})" if cooldown < 1 else "(1.0 - {})"
        if not code.replace_half_cosine(lambda progress: shape.format(progress)):
            raise does_not_apply(f"{self.name}: the schedule holds no half cosine")
        code.reword("half a cosine down", self._shape(parameters))

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"schedule: {self._shape(parameters)}"

    def _shape(self, parameters: Parameters) -> str:
        cooldown = float(parameters["cooldown"])
        if cooldown >= 1:
            return "a straight line down"
        return f"a plateau and a straight line down over the last {cooldown:.0%}"


class Muon(TrainingEdit):
    """Source: Jordan et al. 2024, "Muon"; the update's scale is Liu et al.'s (2025)."""

    name = "muon"
    about = "optimizer"
    title = "Muon for hidden matrices"
    why = "Orthogonal updates use every direction of a matrix, so each step learns more."
    hope = "much lower loss a step, slightly slower steps"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {
            "momentum": rng.choice([0.9, 0.95]),
            "iterations": rng.choice([3, 5]),
            "precision": rng.choice(["float32", "bfloat16"]),
        }

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        precision = parameters["precision"]
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision cannot be {precision!r}")
        source = _MUON.format(
            precision=precision,
            momentum=float(parameters["momentum"]),
            iterations=int(parameters["iterations"]),
        )
        if code.defines("Muon"):
            raise does_not_apply(f"{self.name}: there already")
        model = code.receiver_of("parameters") or code.receiver_of("named_parameters")
        where = code.top_level_definition_calling("AdamW")
        if model is None or where is None:
            raise does_not_apply(f"{self.name}: no function builds an AdamW of a model")
        code.redirect_calls("AdamW", "Muon", first_argument=model)
        code.need("torch", "nn")
        code.insert_before(where, source)
        code.reword("Build AdamW with decay", "Build Muon with decay")


_MUON = '''
def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return the nearest matrices with orthonormal rows or columns, roughly; (N, rows, columns)."""
    X = matrices.to(torch.{precision})
    if tall := X.size(-2) > X.size(-1):
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range({iterations}):
        # A quintic polynomial that pushes all singular values of X towards 1.
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return (X.mT if tall else X).to(matrices.dtype)


class Muon(torch.optim.AdamW):
    """Moves hidden matrices by their orthogonalised momentum, and all else as AdamW does."""

    def __init__(self, model: nn.Module, groups: object, **options: object) -> None:
        super().__init__(groups, **options)
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        vocabulary = embeddings[0].num_embeddings if embeddings else None
        hidden = [linear.weight for linear in linears if linear.out_features != vocabulary]
        # Matrices of one shape share their products: many small ones take longer than one large.
        self.stacks: dict[torch.Size, list[nn.Parameter]] = {{}}
        for weight in hidden:
            self.stacks.setdefault(weight.shape, []).append(weight)
        self.momenta = {{
            shape: torch.zeros(len(stack), *shape, device=stack[0].device)
            for shape, stack in self.stacks.items()
        }}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        group = self.param_groups[0]
        for shape, stack in self.stacks.items():
            if any(weight.grad is None for weight in stack):
                continue
            gradients = torch.stack([weight.grad for weight in stack])
            momentum = self.momenta[shape].lerp_(gradients, 1 - {momentum})
            updates = orthogonal(gradients.lerp_(momentum, {momentum}))
            # This factor gives an update the size of AdamW's, so that both share one rate.
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            for weight, update in zip(stack, updates, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)
                weight.grad = None  # so that AdamW leaves it alone
        super().step(closure)
'''

TRAINING_EDITS: tuple[BuiltInEdit, ...] = (
    Trapezoid(),
    Muon(),
)
