"""Built-in edits of the model: what a block computes, and how it starts out.

Each rewrites model.py only, keeps the model causal, serves any length up to the context, and
leaves `build_model` able to rebuild it from the same `model.json`.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import BuiltInEdit, CodeEdit, Parameters, does_not_apply

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code

ATTENTION = "scaled_dot_product_attention"


class ModelEdit(CodeEdit):
    """A rewrite of model.py."""

    file = "model.py"

    def attention_class(self, code: Code) -> str:
        """Return the first class that calls torch's attention.

        Raises:
            EditFailed: none does.
        """
        for name in code.classes_calling(ATTENTION):
            return name
        raise does_not_apply(f"{self.name}: no class calls {ATTENTION}")

    def wrap_queries_and_keys(self, code: Code, function: str) -> None:
        """Pass what attention compares, each (B, H, T, D), through a function first.

        Raises:
            EditFailed: a call of torch's attention is written in some other way.
        """
        wrapped = code.wrap_arguments(ATTENTION, ("query", "key"), lambda x: f"{function}({x})")
        if not wrapped or wrapped % 2:
            raise does_not_apply(f"{self.name}: cannot tell queries and keys")


class SquaredReLU(ModelEdit):
    """Source: So et al. 2021, "Primer: Searching for Efficient Transformers"."""

    name = "squared_relu"
    about = "activation"
    title = "squared ReLU in the MLP"
    why = "A squared ReLU is cheaper than GELU and its sparse hidden layer learns faster."
    hope = "lower loss at more steps a second"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        code.need("F")
        smooth = {"gelu", "silu", "mish"}
        if code.replace_calls(smooth, lambda a: f"F.relu({a[0]}).square()" if a else None):
            return
        layers = code.classes_calling("GELU", "SiLU", "Mish")
        if not layers or code.defines("SquaredReLU"):
            raise does_not_apply(f"{self.name}: no smooth activation to replace")
        code.insert_before(
            layers[0],
            '''
            class SquaredReLU(nn.Module):
                """Squares what is positive and drops the rest."""

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    return F.relu(x).square()
            ''',
        )
        code.need("nn", "torch")
        code.replace_calls({"GELU", "SiLU", "Mish"}, lambda _: "SquaredReLU()")


class RMSNorm(ModelEdit):
    """Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"."""

    name = "rms_norm"
    about = "norm"
    title = "RMSNorm for LayerNorm"
    why = "Centring the activations buys nothing here; scaling alone is less work a step."
    hope = "the same loss a step, slightly more steps"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        if not code.replace_calls({"LayerNorm"}, lambda a: f"nn.RMSNorm({a[0]})" if a else None):
            raise does_not_apply(f"{self.name}: no LayerNorm is made")
        code.drop_class_if_unused("LayerNorm")
        code.need("nn")


class Rotary(ModelEdit):
    """Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding"."""

    name = "rotary"
    about = "positions"
    title = "rotary positions for learned ones"
    why = "Rotating queries and keys gives attention relative positions without learning them."
    hope = "much lower loss within a short budget"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        # Short contexts need no slow rotations, so smaller bases than the usual 10,000 may pay.
        return {"base": rng.choice([100, 1_000, 10_000])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        attention, model = self.attention_class(code), code.model_class()
        if code.defines("rotate_by_position"):
            raise does_not_apply(f"{self.name}: there already")
        tokens = code.parameter_of((model, "forward"))
        learned = [
            attribute
            for attribute in code.attributes_made_by(model, "Embedding")
            if not code.calls_own_with((model, "forward"), attribute, tokens)
        ]
        if len(learned) != 1 or not code.drop_added_call((model, "forward"), learned[0]):
            raise does_not_apply(f"{self.name}: no learned positions are added to the tokens")
        code.drop_attribute(model, learned[0])
        code.reword("learned positions", "rotary positions")
        self.wrap_queries_and_keys(code, "rotate_by_position")
        code.need("lru_cache", "torch")
        code.insert_before(
            attention,
            f'''
            @lru_cache(maxsize=64)
            def rotation(T: int, D: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
                """Return cosines and sines (T, D / 2) of every position's rotation angles."""
                # A table first made in inference mode could not be trained through later.
                with torch.inference_mode(False):
                    slowness = torch.linspace(0, 1, D // 2, device=device)
                    rates = {float(parameters["base"])} ** -slowness  # radians a position
                    angles = torch.outer(torch.arange(T, device=device), rates)  # (T, D / 2)
                    return angles.cos(), angles.sin()


            def rotate_by_position(x: torch.Tensor) -> torch.Tensor:
                """Rotate pairs of channels of x (B, H, T, D) by angles that grow with position."""
                cos, sin = rotation(x.size(-2), x.size(-1), x.device)
                a, b = x.float().chunk(2, dim=-1)  # two of (B, H, T, D / 2)
                return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)
            ''',
        )


class QKNorm(ModelEdit):
    """Source: Henry et al. 2020, "Query-Key Normalization for Transformers"."""

    name = "qk_norm"
    about = "attention scores"
    title = "QK norm"
    why = "Normalised queries and keys bound the attention scores, so higher rates stay stable."
    hope = "steadier training, room for a higher rate"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        # The first does less; on processors without a kernel of its own the second is faster.
        return {"norm": rng.choice(["rms_norm", "layer_norm"])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        attention = self.attention_class(code)
        norm = parameters["norm"]
        if norm not in ("rms_norm", "layer_norm"):
            raise ValueError(f"norm cannot be {norm!r}")
        if code.defines("normalise_heads"):
            raise does_not_apply(f"{self.name}: there already")
        self.wrap_queries_and_keys(code, "normalise_heads")
        code.insert_before(
            attention,
            f'''
            def normalise_heads(x: torch.Tensor) -> torch.Tensor:
                """Scale every head's vector in x (B, H, T, D) to unit size a channel."""
                return F.{norm}(x, (x.size(-1),))
            ''',
        )
        code.need("F", "torch")


class ZeroProjections(ModelEdit):
    """Source: Zhang et al. 2019, "Fixup Initialization", in the form modded-nanogpt uses."""

    name = "zero_projections"
    about = "initial projections"
    title = "zero-initialised residual projections"
    why = "Branches that start silent leave the residual stream clean, so early steps go further."
    hope = "a faster start, higher rates bearable"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        model = code.model_class()
        last = {
            name: linear
            for name in code.classes_calling("Linear")
            if name != model and (linear := code.last_linear(name)) is not None
        }
        if not last:
            raise does_not_apply(f"{self.name}: no block part ends in a linear layer")
        if code.uses("zeros_", (model, "__init__")):
            raise does_not_apply(f"{self.name}: something starts at zero already")
        parts = "\n".join(
            f"    if isinstance(module, {name}):\n        nn.init.zeros_(module.{linear}.weight)"
            for name, linear in last.items()
        )
        code.append(
            (model, "__init__"),
            "# Every branch starts silent: at first a block passes its input on unchanged.\n"
            f"for module in self.modules():\n{parts}",
        )
        code.need("nn")


class LogitSoftCap(ModelEdit):
    """Source: Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size"."""

    name = "logit_soft_cap"
    about = "logits"
    title = "soft cap on the logits"
    why = "Bounded logits keep rare tokens from causing outsized gradients early on."
    hope = "steadier training at high rates"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"cap": rng.choice([10.0, 15.0, 20.0, 30.0])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        cap = float(parameters["cap"])
        forward = (code.model_class(), "forward")
        if code.uses("tanh", forward):
            raise does_not_apply(f"{self.name}: there already")
        if not code.wrap_returns(forward, lambda x: f"{cap} * torch.tanh({x} / {cap})"):
            raise does_not_apply(f"{self.name}: the model returns no plain logits")
        code.need("torch")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title} at {parameters['cap']:g}"


MODEL_EDITS: tuple[BuiltInEdit, ...] = (
    SquaredReLU(),
    RMSNorm(),
    Rotary(),
    QKNorm(),
    ZeroProjections(),
    LogitSoftCap(),
)
