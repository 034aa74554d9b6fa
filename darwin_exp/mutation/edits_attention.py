"""Built-in edits of attention: what it compares, what it passes on, and over how many heads.

Each keeps the model causal and serves any length up to the context.
"""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING, Any

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import (
    BuiltInEdit,
    Parameters,
    Settings,
    SettingsEdit,
    does_not_apply,
    read_settings,
    setting_of,
)
from darwin_exp.mutation.model_parts import ATTENTION, ATTENTION_READS, ModelEdit

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code


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
            raise self.refuse("there already")
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


class ValueResidual(ModelEdit):
    """Source: Zhou et al. 2024, "Value Residual Learning"."""

    name = "value_residual"
    about = "values"
    title = "values mixed with the first block's"
    why = "Deep blocks lose sight of the tokens; the first block's values show them unblurred."
    hope = "lower loss a step at hardly any cost"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"share": rng.choice([0.3, 0.5, 0.7])}

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        share = float(parameters["share"])
        attention, model = self.attention_class(code), code.model_class()
        if code.uses("first_values"):
            raise self.refuse("there already")

        def mix(variables: list[str]) -> str:
            value = variables[2]
            return (
                "if not self.first_values:\n"
                f"    self.first_values.append({value})\n"
                "else:\n"
                f"    {value} = torch.lerp({value}, self.first_values[0], {share})"
            )

        if code.before_calls(ATTENTION, ATTENTION_READS, mix) != 1:
            raise self.refuse("attention is called in more than one place")
        code.append(
            (model, "__init__"),
            f"""
            # The first block leaves its values here, and all later ones mix them into theirs.
            self.first_values: list[torch.Tensor] = []
            for module in self.modules():
                if isinstance(module, {attention}):
                    module.first_values = self.first_values
            """,
        )
        code.prepend((model, "forward"), "self.first_values.clear()")
        # Nothing of one pass may stay behind in a model that is copied, saved or compiled.
        if not code.before_returns((model, "forward"), "self.first_values.clear()"):
            raise self.refuse("the model returns nothing")
        code.need("torch")

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title} ({float(parameters['share']):.0%} of it)"


class GroupedKeysAndValues(ModelEdit):
    """Source: Shazeer 2019, "Fast Transformer Decoding"; Ainslie et al. 2023, "GQA"."""

    name = "grouped_kv"
    about = "key and value heads"
    title = "fewer key and value heads"
    why = "Several query heads can read the same keys and values, which saves weights and products."
    hope = "more steps at about the same loss a step"

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"group": rng.choice([2, 4])}

    def apply(self, genome: Genome, parameters: Parameters) -> Genome:
        child = super().apply(genome, parameters)
        if self._group(genome, parameters) == 1:
            raise self.refuse("the number of heads cannot be divided")
        return child

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        group = int(parameters["group"])
        attention = self.attention_class(code)
        if code.uses("head_group"):
            raise self.refuse("there already")
        heads = code.own_arguments_of((attention, "forward"), "view", "reshape", "unflatten")
        if not heads:
            raise self.refuse("cannot tell the number of heads")
        variables: list[str] = []

        def note(names: list[str]) -> str:
            variables.extend(names)
            return ""

        code.before_calls(ATTENTION, ATTENTION_READS, note)
        linears = set(code.attributes_made_by(attention, "Linear"))
        forward = (attention, "forward")
        query, key, value = (
            sorted(code.layers_behind(forward, name) & linears) for name in variables[:3]
        )
        if query == key == value and len(query) == 1:
            first, width = query[0], self._split_unevenly(code, attention, query[0])
        elif len(key) == len(value) == 1 and len({*query, *key, *value}) == len(query) + 2:
            first, width = self._repeat(code, attention, (key[0], value[0]))
        else:
            raise self.refuse("cannot tell which layers make keys and values")
        if not code.assigned_first(attention, heads[0], first):
            raise self.refuse("the number of heads is known too late")
        code.join(
            attention,
            first,
            f"""
            # So many query heads read the same keys and values.
            self.head_group = math.gcd({group}, self.{heads[0]})
            shared = {width} // self.head_group
            """,
            before=True,
        )
        code.need("math", "torch")

    def _split_unevenly(self, code: Code, attention: str, linear: str) -> str:
        """Make the one layer behind all three narrower; return the width that one had."""
        width = code.made_with(attention, linear, 1, "out_features") or ""
        product = code.numbered_product(width)
        if product is None or product[:2] != (width, 3):
            raise self.refuse(f"{linear} is not three times as wide as the heads")
        single = product[2]
        code.remake(attention, linear, 1, "out_features", f"{single} + 2 * shared")
        cut = [
            code.wrap_layer_calls(
                (attention, "forward"),
                linear,
                lambda x: f"split_grouped({x}, self.head_group)",
                then=method,
            )
            for method in ("split", "chunk")
        ]
        if sum(cut) != 1:
            raise self.refuse("queries, keys and values are cut apart in another way")
        code.insert_before(
            attention,
            '''
            def split_grouped(x: torch.Tensor, group: int) -> list[torch.Tensor]:
                """Cut x into queries, keys and values, each (B, T, C); heads of a group share."""
                shared = x.size(-1) // (group + 2)  # channels of the keys, and of the values
                q, k, v = x.split((group * shared, shared, shared), dim=-1)
                return [q, k.repeat(1, 1, group), v.repeat(1, 1, group)]
            ''',
        )
        return single

    def _repeat(self, code: Code, attention: str, linears: tuple[str, str]) -> tuple[str, str]:
        """Make two layers narrower and repeat their outputs; return the first and its width."""
        widths = {code.made_with(attention, linear, 1, "out_features") for linear in linears}
        width = widths.pop()
        if widths or width is None or not width.replace(".", "_").isidentifier():
            raise self.refuse("keys and values are not of one width")
        for linear in linears:
            code.remake(attention, linear, 1, "out_features", "shared")
            # A convolution of keys, say, works on as many channels as their layer makes.
            outermost = code.layer_around((attention, "forward"), linear)
            code.wrap_layer_calls(
                (attention, "forward"), outermost, lambda x: f"{x}.repeat(1, 1, self.head_group)"
            )
        first = linears[0] if code.assigned_first(attention, *linears) else linears[1]
        return first, width

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        return f"{self.title}, one for {self._group(genome, parameters)} query heads"

    def _group(self, genome: Genome, parameters: Parameters) -> int:
        """Return how many query heads come to share, as far as the settings tell."""
        group, heads = int(parameters["group"]), setting_of(genome, "n_heads")
        return math.gcd(group, heads) if isinstance(heads, int) else group


class ShortConvolution(ModelEdit):
    """Source: So et al. 2021, "Primer: Searching for Efficient Transformers"."""

    name = "short_convolution"
    about = "local mixing in attention"
    title = "short convolution of queries, keys and values"
    why = "Seeing the last three tokens at once lets attention match phrases instead of symbols."
    hope = "much lower loss a step, slightly slower steps"

    def rewrite(self, code: Code, parameters: Parameters) -> None:
        attention = self.attention_class(code)
        if code.defines("ShortConvolution"):
            raise self.refuse("there already")
        last = code.last_linear(attention)
        forward = (attention, "forward")
        reading = [name for name in code.attributes_made_by(attention, "Linear") if name != last]
        if last is None or not reading:
            raise self.refuse("no linear layers make queries, keys and values")
        for linear in reading:
            own = "short_convolution" if len(reading) == 1 else f"{linear}_convolution"
            code.join(
                attention, linear, f"self.{own} = ShortConvolution(self.{linear}.out_features)"
            )
            if not code.wrap_layer_calls(forward, linear, f"self.{own}({{}})".format):
                raise self.refuse(f"{linear} is not called")
        code.insert_before(
            attention,
            '''
            class ShortConvolution(nn.Module):
                """Adds to every channel what it held one and two positions before, weighted."""

                def __init__(self, width: int) -> None:
                    super().__init__()
                    # At first nothing is added. Shifts are faster than a convolution's kernel.
                    self.one_before = nn.Parameter(torch.zeros(width))
                    self.two_before = nn.Parameter(torch.zeros(width))

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    past = F.pad(x, (0, 0, 2, 0))  # (B, 2 + T, C)
                    x = torch.addcmul(x, past[:, 1:-1], self.one_before.type_as(x))
                    return torch.addcmul(x, past[:, :-2], self.two_before.type_as(x))
            ''',
        )
        code.need("F", "nn", "torch")


class HeadCount(SettingsEdit):
    """Source: Vaswani et al. 2017, "Attention Is All You Need", table 3."""

    name = "head_count"
    about = "heads"
    title = "another number of heads"
    why = "More heads look at more places at once; fewer, wider ones compare more precisely."
    hope = "slightly lower loss, or faster steps with fewer"
    repeatable = True

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        settings = read_settings(genome)
        try:
            width, heads = int(settings["width"]), int(settings["n_heads"])
        except (KeyError, TypeError, ValueError) as error:
            raise does_not_apply(f"{self.name}: settings tell no heads: {error!r}") from error
        fitting = [
            count
            for count in (heads // 4, heads // 2, heads * 2, heads * 4)
            if count >= 1 and self._fits(width, count)
        ]
        if not fitting:
            raise does_not_apply(f"{self.name}: a width of {width} leaves no room")
        return {"value": rng.choice(fitting)}

    def change(self, settings: Settings, parameters: Parameters) -> None:
        settings["n_heads"]
        if not self._fits(settings["width"], parameters["value"]):
            raise does_not_apply(f"{self.name}: does not divide a width of {settings['width']}")
        settings["n_heads"] = parameters["value"]

    def _fits(self, width: int, heads: int) -> bool:
        # An odd number of channels a head cannot be rotated in pairs.
        return width % (2 * heads) == 0 and 8 <= width // heads <= 256


ATTENTION_EDITS: tuple[BuiltInEdit, ...] = (
    QKNorm(),
    ValueResidual(),
    GroupedKeysAndValues(),
    ShortConvolution(),
    HeadCount(),
)
