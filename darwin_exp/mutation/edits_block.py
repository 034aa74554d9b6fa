"""Built-in edits of a block: its MLP, its norms, its branches, and how blocks follow each other."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import BuiltInEdit, Parameters, setting_of
from darwin_exp.mutation.model_parts import ATTENTION, ModelEdit

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code


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
            raise self.refuse("no smooth activation to replace")
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


class SwiGLU(ModelEdit):
    """Source: Shazeer 2020, "GLU Variants Improve Transformer", whose gate starts near 0.

    Such a gate times a small hidden layer would leave the MLP all but silent at first; here, in a
    variant of this project's own, the hidden layer is multiplied by 1 + gate(x).
    """

    name = "swiglu"
    about = "gate"
    title = "gated MLP (SwiGLU with its gate around 1)"
    why = "A gate lets the hidden layer multiply what it has found, at the same number of weights."
    hope = "lower loss a step"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        mlp, first, last, hidden = self.mlp(code)
        if code.defines("gated_width"):
            raise self.refuse("there already")
        forward = (mlp, "forward")
        inputs: list[str] = []

        def note(call: str, arguments: list[str]) -> str:
            inputs.append(arguments[0] if len(arguments) == 1 else "")
            return call

        code.rewrite_layer_calls(forward, first, note)
        if len(inputs) != 1 or not inputs[0]:
            raise self.refuse(f"{first} is called in another way")
        code.before_layer_call(
            forward,
            first,
            f"gate = 1.0 + self.gate({inputs[0]})  # (B, T, hidden), near 1 at first",
        )
        code.rewrite_layer_calls(forward, last, lambda _, a: f"self.{last}({_factor(a[0])} * gate)")
        # Another activation, such as a squared ReLU, stays what it is.
        code.replace_calls({"gelu"}, lambda a: f"F.silu({a[0]})" if a else None, within=forward)
        code.replace_calls({"GELU"}, lambda _: "nn.SiLU()", within=(mlp, "__init__"))
        code.remake(mlp, first, 1, "out_features", f"gated_width({hidden})")
        code.remake(mlp, last, 0, "in_features", f"gated_width({hidden})")
        own = f"self.{first}"
        code.join(
            mlp,
            first,
            f"""
            self.gate = nn.Linear(
                {own}.in_features, {own}.out_features, bias={own}.bias is not None
            )
            """,
        )
        code.insert_before(
            mlp,
            '''
            def gated_width(hidden: int) -> int:
                """Return the hidden width at which three matrices weigh about as much as two."""
                return max(8, 8 * round(hidden / 12))
            ''',
        )
        code.reword("a hidden layer four times as wide", "a gated hidden layer")
        code.reword("(B, T, 4C)", "(B, T, hidden)")
        code.need("F", "nn")


class HiddenRatio(ModelEdit):
    """Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 3.1."""

    name = "hidden_ratio"
    about = "hidden width"
    title = "another hidden width of the MLP"
    why = "A wide hidden layer makes larger, more efficient products; a narrow one faster steps."
    hope = "a better balance of speed and size"
    repeatable = True

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"ratio": rng.choice([2, 3, 6, 8])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        ratio = int(parameters["ratio"])
        mlp, first, last, hidden = self.mlp(code)
        product = code.numbered_product(hidden)
        if product is None:
            raise self.refuse("the hidden width is no multiple of another")
        whole, present, width = product
        if present == ratio:
            raise self.refuse(f"{ratio} times as wide already")
        resized = hidden.replace(whole, f"{ratio} * {width}")
        code.remake(mlp, first, 1, "out_features", resized)
        code.remake(mlp, last, 0, "in_features", resized)
        for word in ("four", str(present)):
            code.reword(f"{word} times as wide", f"{ratio} times as wide")
        code.reword(f"(B, T, {present}C)", f"(B, T, {ratio}C)")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title}, {parameters['ratio']} times as wide"


class RMSNorm(ModelEdit):
    """Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"."""

    name = "rms_norm"
    about = "norm"
    title = "RMSNorm for LayerNorm"
    why = "Centring the activations buys nothing here; scaling alone is less work a step."
    hope = "the same loss a step, slightly more steps"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        if not code.replace_calls({"LayerNorm"}, lambda a: f"nn.RMSNorm({a[0]})" if a else None):
            raise self.refuse("no LayerNorm is made")
        code.drop_class_if_unused("LayerNorm")
        code.need("nn")


class SandwichNorm(ModelEdit):
    """Source: Ding et al. 2021, "CogView: Mastering Text-to-Image Generation via Transformers".

    Gains that start below 1 are this project's own choice.
    """

    name = "sandwich_norm"
    about = "branch norm"
    title = "a norm on every branch's output, too"
    why = "What a branch adds keeps its size however its weights grow, so high rates stay stable."
    hope = "steadier training, room for a higher rate"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        # Embeddings start small; a gain of 1, which is common, drowns them in a small model.
        return {"gain": rng.choice([0.02, 0.05, 0.1])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        gain = float(parameters["gain"])
        if code.uses("output_gain"):
            raise self.refuse("there already")
        branches, zeroed = self.branches(code), code.passed_to("zeros_")
        if any(x.endswith(f".{last}.weight") for x in zeroed for last in branches.values()):
            raise self.refuse("it would blow up projections that start at zero")
        for name, last in branches.items():
            code.append(
                (name, "__init__"),
                f"self.output_gain = nn.Parameter(torch.full((self.{last}.out_features,), {gain}))",
            )
            code.wrap_layer_calls((name, "forward"), last, lambda x: f"self.normalised({x})")
            code.add_method(
                name,
                '''
                def normalised(self, x: torch.Tensor) -> torch.Tensor:
                    """Bring every position of x (B, T, C) to the size that the gain says."""
                    return F.layer_norm(x, self.output_gain.shape, self.output_gain)
                ''',
            )
        code.need("F", "nn", "torch")


class LayerScale(ModelEdit):
    """Source: Touvron et al. 2021, "Going deeper with Image Transformers"."""

    name = "layer_scale"
    about = "branch gain"
    title = "a learnt gain on every channel of a branch"
    why = "Each branch finds out channel by channel how much of it the residual stream bears."
    hope = "a faster start in deep models"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"gain": rng.choice([0.1, 0.3, 1.0])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        gain = float(parameters["gain"])
        if code.uses("branch_gain"):
            raise self.refuse("there already")
        for name, last in self.branches(code).items():
            code.append(
                (name, "__init__"),
                f"self.branch_gain = nn.Parameter(torch.full((self.{last}.out_features,), {gain}))",
            )
            # A norm on the output would undo a gain on what it normalises.
            normed = code.uses("output_gain", (name, "__init__"))
            code.wrap_layer_calls(
                (name, "forward"),
                "normalised" if normed else last,
                lambda x: f"{x} * self.branch_gain",
            )
        code.need("nn", "torch")


class ParallelBlock(ModelEdit):
    """Source: Wang and Komatsuzaki 2021, "GPT-J-6B"; Chowdhery et al. 2022, "PaLM"."""

    name = "parallel_block"
    about = "order of branches"
    title = "attention and MLP side by side"
    why = "Both branches can read one normalised copy, which saves a norm and a step of waiting."
    hope = "slightly faster steps at about the same loss"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        self.attention_class(code)
        for name in code.classes_calling(*self.branches(code)):
            if code.merge_branches(name):
                break
        else:
            raise self.refuse("no block adds two normalised branches one after the other")
        code.reword(
            "Adds attention, then the MLP, to the residual stream; each reads a normalised copy",
            "Adds attention and the MLP to the residual stream; both read one normalised copy",
        )


class TokenShift(ModelEdit):
    """Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era"."""

    name = "token_shift"
    about = "local mixing in blocks"
    title = "half the channels come from the token before"
    why = "Every layer sees neighbouring tokens side by side and need not attend to find them."
    hope = "much lower loss a step, slightly slower steps"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"where": rng.choice(["attention", "MLP", "both"])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        where = parameters["where"]
        if where not in ("attention", "MLP", "both"):
            raise ValueError(f"where cannot be {where!r}")
        if code.defines("shift_half"):
            raise self.refuse("there already")
        attending = code.classes_calling(ATTENTION)
        wanted = {
            name: name in attending
            for name in self.branches(code)
            if where == "both" or (where == "attention") == (name in attending)
        }
        if not wanted:
            raise self.refuse(f"no part of a block is {where}")
        for name in wanted:
            x = code.parameter_of((name, "forward"))
            code.prepend((name, "forward"), f"{x} = shift_half({x})")
        code.insert_before(
            next(iter(wanted)),
            '''
            def shift_half(x: torch.Tensor) -> torch.Tensor:
                """Take the first half of the channels of x (B, T, C) from the position before."""
                half = x.size(-1) // 2
                before = F.pad(x[:, :-1, :half], (0, 0, 1, 0))  # (B, T, C / 2)
                return torch.cat((before, x[:, :, half:]), dim=-1)
            ''',
        )
        code.need("F", "torch")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title} ({parameters['where']})"


class SharedBlocks(ModelEdit):
    """Source: Lan et al. 2019, "ALBERT"; Liu et al. 2024, "MobileLLM" for neighbours sharing."""

    name = "shared_blocks"
    about = "weights of blocks"
    title = "neighbouring blocks share their weights"
    why = "Weights that are used twice learn from twice the gradients, and the optimizer has less."
    hope = "a smaller model at nearly the same loss"

    def apply(self, genome: Genome, parameters: Parameters) -> Genome:
        child = super().apply(genome, parameters)
        if setting_of(genome, "n_layers") == 1:
            raise self.refuse("a single block has no neighbour")
        return child

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        model = code.model_class()
        blocks, _ = self.block_loop(code, model)
        if code.uses("depth", (model, "forward")):
            raise self.refuse("there already")
        made = code.made_with(model, blocks, 0, "modules") or ""
        counts: list[str] = []

        def halve(arguments: list[str]) -> str | None:
            if len(arguments) != 1:
                return None
            counts.append(arguments[0])
            return f"range(({arguments[0]} + 1) // 2)"

        code.replace_calls({"range"}, halve, within=(model, "__init__"))
        if len(counts) != 1 or f"range({counts[0]})" not in made:
            raise self.refuse("the blocks are made in another way")
        code.join(
            model, blocks, f"self.depth = {counts[0]}  # every block is gone through twice in a row"
        )
        code.loop_through(
            (model, "forward"), blocks, f"(self.{blocks}[i // 2] for i in range(self.depth))"
        )


BLOCK_EDITS: tuple[BuiltInEdit, ...] = (
    SquaredReLU(),
    SwiGLU(),
    HiddenRatio(),
    RMSNorm(),
    SandwichNorm(),
    LayerScale(),
    ParallelBlock(),
    TokenShift(),
    SharedBlocks(),
)


def _factor(source: str) -> str:
    """Return an expression that can be multiplied as it stands."""
    return source if source.isidentifier() else f"({source})"
