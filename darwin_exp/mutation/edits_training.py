"""Built-in edits of the training loop: the loss, what is saved, and the host's own work.

Those of the schedule, the optimizer and the batches have modules of their own and are listed
here with the others. All rewrite train.py only and leave the job file and the seed alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from darwin_exp.mutation.builtin import BuiltInEdit, Parameters, does_not_apply
from darwin_exp.mutation.edits_data import DATA_EDITS
from darwin_exp.mutation.edits_optimizer import OPTIMIZER_EDITS
from darwin_exp.mutation.edits_schedule import SCHEDULE_EDITS
from darwin_exp.mutation.training import TrainingEdit

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code


class ZLoss(TrainingEdit):
    """Source: Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways"."""

    name = "z_loss"
    about = "loss"
    title = "z-loss"
    why = "A small pull on the softmax's normaliser keeps logits from drifting at high rates."
    hope = "steadier training at high rates"
    choices: ClassVar = {"weight": (1e-5, 1e-4, 1e-3)}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        weight = float(parameters["weight"])
        if code.defines("cross_entropy_and_z_loss"):
            raise does_not_apply(f"{self.name}: there already")
        if not code.call_instead(["cross_entropy"], "cross_entropy_and_z_loss"):
            raise does_not_apply(f"{self.name}: no cross-entropy is computed")
        code.define_before_use("cross_entropy_and_z_loss", _Z_LOSS.format(weight=weight))
        code.need("F", "torch")
        code.reword("the mean cross-entropy in nats", "the mean cross-entropy and z-loss in nats")


_Z_LOSS = '''
def cross_entropy_and_z_loss(
    input: torch.Tensor, target: torch.Tensor, **options: object
) -> torch.Tensor:
    """Return the cross-entropy of logits (N, V) plus a pull of their normaliser towards 1."""
    log_normaliser = input.logsumexp(dim=-1)  # (N,)
    return F.cross_entropy(input, target, **options) + {weight} * log_normaliser.square().mean()
'''


class AverageAtSave(TrainingEdit):
    """Source: the power-law average of Karras et al. 2024, "Analyzing and Improving the Training
    Dynamics of Diffusion Models"; averaging weights is Polyak and Juditsky's (1992).
    """

    name = "ema_at_save"
    about = "saved weights"
    title = "a moving average of the weights is saved"
    why = "An average over the last steps lies lower in the valley that single steps cross."
    hope = "lower held-out loss, most of all with rates that stay high"
    choices: ClassVar = {"power": (8, 16, 32, 64)}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        power = int(parameters["power"])
        model, optimizer = code.made_from("build_model"), code.optimizer()
        if code.defines("WeightAverage"):
            raise does_not_apply(f"{self.name}: there already")
        if not code.replace_arguments("save_file", 0, lambda x: f"weight_average.over({x})"):
            raise does_not_apply(f"{self.name}: cannot tell where weights are saved")
        code.after_making(optimizer, f"weight_average = WeightAverage({model})")
        # What corrects a step belongs to it, whichever of the two edits came first.
        code.beside_step(after="weight_average.update()", late=True)
        code.define_before_making(optimizer, _WEIGHT_AVERAGE.format(power=power))
        code.need("nn", "torch")


_WEIGHT_AVERAGE = '''
class WeightAverage:
    """Averages the weights over all steps t with weights that grow like t to the power {power}.

    So it reaches back over the same share of a run however long the run is, needs no correction
    at the start, and after the first step is what that step left.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.steps = 0
        # A tensor that goes by several names, such as a tied head's, has one average.
        own = dict(zip(map(id, self.weights), self.averages, strict=True))
        names = model.named_parameters(remove_duplicate=False)
        self.by_name = {{name: own[id(weight)] for name, weight in names}}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        share = 1 - (1 - 1 / self.steps) ** ({power} + 1)
        torch._foreach_lerp_(self.averages, self.weights, share)

    def over(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a state with the averages in the place of the weights."""
        return {{name: self.by_name.get(name, tensor) for name, tensor in state.items()}}
'''


class FewerHostSyncs(TrainingEdit):
    """Source: Karpathy's nanochat for the garbage collector."""

    name = "fewer_host_syncs"
    about = "host work"
    title = "less work for the host"
    why = "Python's collector and one call a tensor in the clip cost time in every step."
    hope = "slightly more steps within the budget"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        if code.uses("freeze"):
            raise does_not_apply(f"{self.name}: there already")
        code.before_training(
            "# A step leaves no cycles behind, so the collector would only search in vain.\n"
            "gc.freeze()\ngc.disable()"
        )
        if code.call_instead(["clip_grad_norm_"], "clip_together"):
            code.define_before_use("clip_together", _CLIP_TOGETHER)
        code.need("gc", "torch")


_CLIP_TOGETHER = '''
@torch.no_grad()
def clip_together(
    parameters: list[torch.nn.Parameter], max_norm: float, **options: object
) -> torch.Tensor:
    """Shorten the gradient to a norm, with two calls for all tensors; return the norm it had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
'''


TRAINING_EDITS: tuple[BuiltInEdit, ...] = (
    *SCHEDULE_EDITS,
    *OPTIMIZER_EDITS,
    *DATA_EDITS,
    ZLoss(),
    AverageAtSave(),
    FewerHostSyncs(),
)
