"""Built-in edits of the optimizer: how weights move, which of them decay, how gradients are scaled.

Each goes beside the optimizer that the script builds, or takes AdamW's place with its options, so
that the settings for rates, betas and decay keep their meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import BuiltInEdit, Parameters, does_not_apply
from darwin_exp.mutation.training import TrainingEdit

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code


_TABLES_OF = '''
def tables_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of embeddings and of output heads.

    A head has an output for every row of an embedding and stands beside it, or around what holds
    it; a layer of that width further in is a hidden one.
    """
    modules = list(model.named_modules())
    embeddings = {name: module for name, module in modules if isinstance(module, nn.Embedding)}
    heads = [
        module
        for name, module in modules
        if isinstance(module, nn.Linear)
        and any(
            place.startswith(name[: name.rfind(".") + 1])
            and module.out_features == embedding.num_embeddings
            for place, embedding in embeddings.items()
        )
    ]
    return [module.weight for module in (*embeddings.values(), *heads)]
'''


class Muon(TrainingEdit):
    """Source: Jordan et al. 2024, "Muon"; the update's scale is Liu et al.'s (2025)."""

    name = "muon"
    about = "optimizer"
    title = "Muon for hidden matrices"
    why = "Orthogonal updates use every direction of a matrix, so each step learns more."
    hope = "much lower loss a step, slightly slower steps"
    choices: ClassVar = {
        "momentum": (0.9, 0.95),
        "iterations": (3, 5),
        "precision": ("float32", "bfloat16"),
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
        if not code.defines("tables_of"):
            code.insert_before(where, _TABLES_OF)
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
        linears = {{id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}}
        hidden = linears - {{id(weight) for weight in tables_of(model)}}
        # Matrices of one shape share their products: many small ones take longer than one large.
        self.stacks: dict[torch.Size, list[nn.Parameter]] = {{}}
        for weight in model.parameters():
            if id(weight) in hidden:
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


class Lion(TrainingEdit):
    """Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"."""

    name = "lion"
    about = "optimizer"
    title = "Lion for AdamW"
    why = "Signs of a blended gradient need one moment only and move all weights equally far."
    hope = "the same loss a step or lower, half the optimizer's memory"
    # A step of full length everywhere bears a rate three to ten times lower than AdamW's.
    choices: ClassVar = {"scale": (0.1, 0.2, 0.33)}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        scale = float(parameters["scale"])
        if code.defines("Lion"):
            raise does_not_apply(f"{self.name}: there already")
        if code.keyword_of("AdamW", "eps") is not None:
            raise does_not_apply(f"{self.name}: it has no epsilon, and one was chosen")
        if code.call_instead(["AdamW"], "Lion") != 1:
            raise does_not_apply(f"{self.name}: no AdamW is built")
        code.define_before_use("Lion", _LION.format(scale=scale))
        code.need("torch")
        code.reword("Build AdamW with decay", "Build Lion with decay")


_LION = '''
class Lion(torch.optim.Optimizer):
    """Moves every weight by the sign of a blend of its gradient and its momentum."""

    def __init__(
        self,
        groups: object,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **for_adamw_only: object,
    ) -> None:
        super().__init__(groups, {{"lr": lr, "betas": betas, "weight_decay": weight_decay}})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            gradients = [weight.grad for weight in weights]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["momentum"] for weight in weights]
            beta1, beta2 = group["betas"]
            updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
            torch._foreach_sign_(updates)
            # Decay keeps AdamW's rate, so that its setting means what it meant.
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, updates, alpha=-{scale} * group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - beta2)
'''


class Cautious(TrainingEdit):
    """Source: Liang et al. 2024, "Cautious Optimizers"."""

    name = "cautious"
    about = "caution"
    title = "no step against the gradient"
    why = "Momentum moves some weights against their newest gradient; those steps tend to be wrong."
    hope = "lower loss a step, slightly slower steps"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        optimizer = code.optimizer()
        if code.defines("Caution"):
            raise does_not_apply(f"{self.name}: there already")
        code.after_making(optimizer, f"caution = Caution({optimizer})")
        code.beside_step(before="caution.remember()", after="caution.correct()")
        code.define_before_making(optimizer, _CAUTION)
        code.need("torch")


_CAUTION = '''
class Caution:
    """Takes back what a step of any optimizer did against the gradient."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.weights = [w for group in optimizer.param_groups for w in group["params"]]
        self.before = [weight.detach().clone() for weight in self.weights]
        self.gradients: list[torch.Tensor | None] = []

    @torch.no_grad()
    def remember(self) -> None:
        # The step itself may drop gradients, so their own references are kept.
        self.gradients = [weight.grad for weight in self.weights]
        torch._foreach_copy_(self.before, self.weights)

    @torch.no_grad()
    def correct(self) -> None:
        for weight, before, gradient in zip(
            self.weights, self.before, self.gradients, strict=True
        ):
            if gradient is None:
                continue
            update = weight.sub_(before)
            agrees = (update * gradient <= 0).to(update.dtype)
            # What is kept grows, so that the step stays about as long as it was.
            update.mul_(agrees).mul_(1 / agrees.mean().clamp(min=0.1))
            weight.add_(before)
        self.gradients = []
'''


class _TablesApart(TrainingEdit):
    """Gives embeddings and the output head parameter groups of their own."""

    def set_apart(self, code: Code, options: str) -> None:
        """Call the function that does so, with other options for those groups, and define it."""
        model, optimizer = code.made_from("build_model"), code.optimizer()
        code.after_making(optimizer, f"set_tables_apart({optimizer}, {model}, {options})")
        if not code.defines("tables_of"):
            code.define_before_making(optimizer, _TABLES_OF)
        if not code.defines("set_tables_apart"):
            code.define_before_making(optimizer, _SET_TABLES_APART)
        code.need("nn", "torch")


_SET_TABLES_APART = '''
def set_tables_apart(
    optimizer: torch.optim.Optimizer, model: nn.Module, **options: float
) -> None:
    """Move embeddings and the output head to groups of their own, with other options."""
    tables = {id(weight) for weight in tables_of(model)}
    for group in list(optimizer.param_groups):
        apart = [weight for weight in group["params"] if id(weight) in tables]
        if len(apart) == len(group["params"]):
            group.update(options)
        elif apart:
            group["params"] = [weight for weight in group["params"] if id(weight) not in tables]
            optimizer.add_param_group({**group, "params": apart, **options})
'''


class DecayGroups(_TablesApart):
    """Source: Kosson et al. 2024, "Rotational Equilibrium", on which weights decay balances."""

    name = "decay_groups"
    about = "decay groups"
    title = "decay on other weights"
    why = "Rows of rare tokens shrink between uses where they decay; gains drift where they do not."
    hope = "slightly lower loss"
    choices: ClassVar = {"decaying": ("hidden matrices", "everything")}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        if code.uses("strongest_decay") or ", weight_decay=0.0)" in code.text:
            raise does_not_apply(f"{self.name}: there already")
        if parameters["decaying"] == "hidden matrices":
            self.set_apart(code, "weight_decay=0.0")
        elif parameters["decaying"] == "everything":
            optimizer = code.optimizer()
            code.after_making(
                optimizer,
                f"strongest_decay = max(g['weight_decay'] for g in {optimizer}.param_groups)\n"
                f"for parameter_group in {optimizer}.param_groups:\n"
                "    parameter_group['weight_decay'] = strongest_decay",
            )
        else:
            raise ValueError(f"decaying cannot be {parameters['decaying']!r}")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title}: {parameters['decaying']}"


class EmbeddingRate(_TablesApart):
    """Source: Yang et al. 2022, "Tensor Programs V"; Jordan's modded-nanogpt uses such rates."""

    name = "embedding_rate"
    about = "embedding rate"
    title = "another rate for the embeddings"
    why = "A row is only moved when its token occurs, so embeddings may bear another rate."
    hope = "lower loss early on"
    choices: ClassVar = {"factor": (0.3, 0.5, 1.5, 2.0, 3.0)}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        factor = float(parameters["factor"])
        if "rate_factor" in code.text:
            raise does_not_apply(f"{self.name}: there already")
        if not code.scale_assigned("lr", lambda group: f'{group}.get("rate_factor", 1.0)'):
            raise does_not_apply(f"{self.name}: no schedule sets the groups' rates")
        self.set_apart(code, f"rate_factor={factor}")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title}: times {parameters['factor']:g}"


class Epsilon(TrainingEdit):
    """Source: Wortsman et al. 2023, "Small-scale Proxies for Large-scale Transformer Training"."""

    name = "adamw_eps"
    about = "epsilon"
    title = "another epsilon in AdamW"
    why = "Gradients of large batches and late layers can be small beside epsilon, or all noise."
    hope = "steadier or longer steps for weights with small gradients"
    choices: ClassVar = {"eps": (1e-12, 1e-6, 1e-5, 1e-4)}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        eps = float(parameters["eps"])
        if not code.add_keyword(["Adam", "AdamW", "Muon", "NAdam", "RAdam"], "eps", f"{eps}"):
            raise does_not_apply(f"{self.name}: no AdamW without an epsilon is built")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title}: {parameters['eps']:g}"


class GradientNormalisation(TrainingEdit):
    """Source: Cutkosky and Mehta 2020, "Momentum Improves Normalized SGD"; per tensor it is
    close to the LARS of You et al. 2017.
    """

    name = "gradient_normalisation"
    about = "clip"
    title = "gradients of one length"
    why = "A clip shortens early steps only; at one length all steps have the same say in moments."
    hope = "faster adaptation once gradients have become short"
    choices: ClassVar = {"each": ("step", "tensor")}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        scales = {
            "step": "max_norm / (torch.stack(norms).norm() + 1e-6)",
            "tensor": "[max_norm / (norm + 1e-6) for norm in norms]",
        }
        source = _NORMALISE.format(each=parameters["each"], scale=scales[parameters["each"]])
        if not code.call_instead(["clip_grad_norm_", "clip_together"], "normalise_gradients"):
            raise does_not_apply(f"{self.name}: the gradient is not clipped by its norm")
        code.define_before_use("normalise_gradients", source)
        code.need("torch")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title} in each {parameters['each']}"


_NORMALISE = '''
@torch.no_grad()
def normalise_gradients(
    parameters: list[torch.nn.Parameter], max_norm: float, **options: object
) -> None:
    """Give the gradient the norm `max_norm` in each {each}, be it longer or shorter."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)
    torch._foreach_mul_(gradients, {scale})
'''


OPTIMIZER_EDITS: tuple[BuiltInEdit, ...] = (
    Muon(),
    Lion(),
    Cautious(),
    DecayGroups(),
    EmbeddingRate(),
    Epsilon(),
    GradientNormalisation(),
)
