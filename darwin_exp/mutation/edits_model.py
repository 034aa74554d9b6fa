"""Built-in edits of the model: how its weights start out, and the list of all of model.py.

Each rewrites model.py only, keeps the model causal, serves any length up to the context, and
leaves `build_model` able to rebuild it from the same `model.json`.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import BuiltInEdit, Parameters
from darwin_exp.mutation.edits_attention import ATTENTION_EDITS
from darwin_exp.mutation.edits_block import BLOCK_EDITS
from darwin_exp.mutation.edits_embedding import EMBEDDING_EDITS
from darwin_exp.mutation.model_parts import ModelEdit

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code


class ZeroProjections(ModelEdit):
    """Source: Zhang et al. 2019, "Fixup Initialization", in the form modded-nanogpt uses."""

    name = "zero_projections"
    about = "initial projections"
    title = "zero-initialised residual projections"
    why = "Branches that start silent leave the residual stream clean, so early steps go further."
    hope = "a faster start, higher rates bearable"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        model = code.model_class()
        last = self.branches(code)
        if code.uses("zeros_", (model, "__init__")):
            raise self.refuse("something starts at zero already")
        if code.uses("output_gain"):
            raise self.refuse("a norm on a branch's output would blow up what starts at zero")
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


class InitialScale(ModelEdit):
    """Source: Glorot and Bengio 2010, "Understanding the difficulty of training deep networks"."""

    name = "init_scale"
    about = "initial scale"
    title = "another size of the initial weights"
    why = "A short run cannot grow its weights far, so the size that they start at matters."
    hope = "a faster start"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"factor": rng.choice([0.5, 1.5, 2.0, 3.0])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        factor = float(parameters["factor"])
        model = code.model_class()
        if code.defines("scale_weights"):
            raise self.refuse("there already")
        code.append((model, "__init__"), "scale_weights(self)")
        code.insert_before(
            model,
            f'''
            @torch.no_grad()
            def scale_weights(model: nn.Module) -> None:
                """Start layers' matrices at another size than the one that they were drawn with."""
                layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
                # Layers that share a matrix scale it once.
                for weight in {{id(layer.weight): layer.weight for layer in layers}}.values():
                    weight.mul_({factor})
            ''',
        )
        code.need("nn", "torch")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title} (x {parameters['factor']:g})"


MODEL_EDITS: tuple[BuiltInEdit, ...] = (
    *EMBEDDING_EDITS,
    *ATTENTION_EDITS,
    *BLOCK_EDITS,
    ZeroProjections(),
    InitialScale(),
)
