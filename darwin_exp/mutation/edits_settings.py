"""Built-in edits of settings.json: rates, batch, regularisation, shape.

Each changes values that train.py reads already, and adds no key of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

from darwin_exp.individual import Genome
from darwin_exp.mutation.builtin import (
    BuiltInEdit,
    Parameters,
    Settings,
    SettingsEdit,
    does_not_apply,
    read_settings,
)


class _Scaled(SettingsEdit):
    """Multiplies a number by a drawn factor, and stays within sane bounds."""

    key: ClassVar[str]
    factors: ClassVar[Sequence[float]]
    least: ClassVar[float]
    most: ClassVar[float]
    repeatable = True

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"factor": rng.choice(self.factors)}

    def change(self, settings: Settings, parameters: Parameters) -> None:
        old = settings[self.key]
        new = old * parameters["factor"]
        if isinstance(old, int):
            # Small counts would round back to what they were.
            new = max(old + 1, round(new)) if new > old else min(old - 1, round(new))
        else:
            new = float(f"{new:.4g}")  # 0.006 rather than 0.006000000000000001
        if not self.least <= new <= self.most:
            raise does_not_apply(f"{self.name}: {self.key} {new:g} would go too far")
        settings[self.key] = new


class _Chosen(SettingsEdit):
    """Sets one value, drawn from those that differ from the present one."""

    key: ClassVar[str]
    choices: ClassVar[Sequence[Any]]
    repeatable = True

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        present = read_settings(genome).get(self.key)
        return {"value": rng.choice([value for value in self.choices if value != present])}

    def change(self, settings: Settings, parameters: Parameters) -> None:
        settings[self.key]  # a trainer without this setting would refuse it
        settings[self.key] = parameters["value"]


class _Switched(SettingsEdit):
    """Sets one value, always the same."""

    key: ClassVar[str]
    value: ClassVar[Any]

    def change(self, settings: Settings, parameters: Parameters) -> None:
        settings[self.key]  # a trainer without this setting would refuse it
        settings[self.key] = self.value


class HigherRate(_Scaled):
    name = "higher_rate"
    about = "peak rate"
    title = "higher peak rate"
    why = "A short budget rewards the largest rate that stays stable."
    hope = "much lower loss if it stays stable"
    key, factors, least, most = "learning_rate", (1.25, 1.5, 2.0, 3.0), 1e-5, 5e-2


class LowerRate(_Scaled):
    name = "lower_rate"
    about = "peak rate"
    title = "lower peak rate"
    why = "Other edits may have pushed training past the rate that it bears."
    hope = "steadier training"
    key, factors, least, most = "learning_rate", (0.5, 0.7, 0.85), 1e-5, 5e-2


class WarmUp(_Chosen):
    name = "warm_up"
    about = "warm-up"
    title = "another warm-up"
    why = "Steps spent warming up are steps not spent learning, but too few let high rates diverge."
    hope = "a few more useful steps"
    key, choices = "warmup_fraction", (0.01, 0.02, 0.05, 0.1, 0.15)


class FinalRate(_Chosen):
    name = "final_rate"
    about = "final rate"
    title = "another final rate"
    why = "Decaying all the way settles the weights before they are scored."
    hope = "slightly lower final loss"
    key, choices = "final_rate_fraction", (0.0, 0.03, 0.1)


class LargerBatch(_Scaled):
    name = "larger_batch"
    about = "batch"
    title = "larger batch"
    why = "More sequences at a time use the processor better and quieten the gradient."
    hope = "more tokens a second, fewer steps"
    key, factors, least, most = "batch_size", (1.25, 1.5, 2.0), 1, 4096


class SmallerBatch(_Scaled):
    name = "smaller_batch"
    about = "batch"
    title = "smaller batch"
    why = "A short budget may be better spent on more, noisier steps."
    hope = "more steps within the budget"
    key, factors, least, most = "batch_size", (0.5, 0.67, 0.8), 1, 4096


class Accumulation(SettingsEdit):
    """Source: nanoGPT, which sums up gradients where a batch does not fit."""

    name = "accumulation"
    about = "batch"
    title = "gradients of several batches a step"
    why = "Small pieces stay in the processor's cache; more of them quieten the gradient."
    hope = "faster steps of the same size, or fewer and calmer ones"
    repeatable = True

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        return {"factor": 2, "same_tokens": rng.choice([True, False])}

    def change(self, settings: Settings, parameters: Parameters) -> None:
        factor, batch = int(parameters["factor"]), settings["batch_size"]
        if settings["accumulation_steps"] * factor > 1024:
            raise does_not_apply(f"{self.name}: a step would take too many batches")
        if parameters["same_tokens"]:
            batch, rest = divmod(batch, factor)
            if rest or not batch:
                raise does_not_apply(f"{self.name}: the batch cannot be cut into {factor}")
        settings["accumulation_steps"] *= factor
        settings["batch_size"] = batch


class Betas(SettingsEdit):
    name = "betas"
    about = "betas"
    title = "other AdamW betas"
    why = "Few steps call for shorter memories of the gradient and of its square."
    hope = "faster adaptation early on"
    repeatable = True
    pairs: ClassVar[Sequence[tuple[float, float]]] = (
        (0.9, 0.95),
        (0.85, 0.95),
        (0.85, 0.99),
        (0.8, 0.95),
        (0.95, 0.99),
        (0.9, 0.98),
    )

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        settings = read_settings(genome)
        present = (settings.get("beta1"), settings.get("beta2"))
        beta1, beta2 = rng.choice([pair for pair in self.pairs if pair != present])
        return {"beta1": beta1, "beta2": beta2}

    def change(self, settings: Settings, parameters: Parameters) -> None:
        for key in ("beta1", "beta2"):
            settings[key]
            settings[key] = parameters[key]


class WeightDecay(_Chosen):
    name = "weight_decay"
    about = "weight decay"
    title = "another weight decay"
    why = "A run that sees every token about once hardly overfits, so decay may only cost."
    hope = "slightly lower loss"
    key, choices = "weight_decay", (0.0, 0.01, 0.03, 0.1, 0.3)


class Clip(_Chosen):
    name = "gradient_clip"
    about = "clip"
    title = "another gradient clip"
    why = "A tighter clip guards high rates; a looser one lets early steps be as long as they are."
    hope = "stability at high rates"
    key, choices = "gradient_clip", (0.3, 0.5, 1.0, 2.0, 5.0)


class UntiedHead(_Switched):
    name = "untied_head"
    about = "head"
    title = "untied output head"
    why = (
        "Reading and predicting tokens are different jobs; with few tokens two matrices are cheap."
    )
    hope = "lower loss for hardly more work"
    key, value = "tied_head", False


class BFloat16(_Switched):
    name = "bfloat16"
    about = "precision"
    title = "bfloat16 autocast"
    why = "Processors with bfloat16 units multiply matrices several times faster in it."
    hope = "more steps within the budget, on the right processor"
    key, value = "precision", "bfloat16"


class _Reshaped(SettingsEdit):
    """Trades depth against width at about the same number of weights in the blocks."""

    about = "shape"
    repeatable = True
    layers_step: ClassVar[int]

    def change(self, settings: Settings, parameters: Parameters) -> None:
        layers, width, heads = settings["n_layers"], settings["width"], settings["n_heads"]
        new_layers = layers + self.layers_step
        if not 1 <= new_layers <= 48:
            raise does_not_apply(f"{self.name}: {layers} layers leave no room")
        # Weights go with layers x width^2. Whole heads of an unchanged width keep attention fast;
        # where those are too coarse, every head gets another width, an even one for rotations.
        head_width, factor = width // heads, (layers / new_layers) ** 0.5
        shapes = (
            (round(width * factor / head_width), head_width),
            (heads, 2 * round(head_width * factor / 2)),
        )
        for new_heads, new_head_width in shapes:
            new_width = new_heads * new_head_width
            size = new_layers * new_width**2 / (layers * width**2)
            if abs(size - 1) <= 0.2 and (new_width - width) * self.layers_step < 0:
                settings.update(n_layers=new_layers, n_heads=new_heads, width=new_width)
                return
        raise does_not_apply(f"{self.name}: no width near {width * factor:.0f} fits {heads} heads")


class ShallowerWider(_Reshaped):
    name = "shallower_wider"
    title = "one layer fewer, wider"
    why = "Fewer, larger matrix products run at a higher rate, and short runs use little depth."
    hope = "more tokens a second at equal size"
    layers_step = -1


class DeeperNarrower(_Reshaped):
    name = "deeper_narrower"
    title = "one layer more, narrower"
    why = "Another layer composes more, where the budget is long enough to train it."
    hope = "lower loss a token"
    layers_step = 1


class MoreLayers(_Scaled):
    name = "more_layers"
    about = "shape"
    title = "more layers"
    why = "Where every step is cheap, the model rather than the budget may be what limits the loss."
    hope = "lower loss a step, fewer steps"
    key, factors, least, most = "n_layers", (1.25, 1.5), 1, 48


class FewerLayers(_Scaled):
    name = "fewer_layers"
    about = "shape"
    title = "fewer layers"
    why = "A smaller model takes more steps within the same time."
    hope = "more steps within the budget"
    key, factors, least, most = "n_layers", (0.5, 0.75), 1, 48


SETTINGS_EDITS: tuple[BuiltInEdit, ...] = (
    HigherRate(),
    LowerRate(),
    WarmUp(),
    FinalRate(),
    LargerBatch(),
    SmallerBatch(),
    Accumulation(),
    Betas(),
    WeightDecay(),
    Clip(),
    UntiedHead(),
    BFloat16(),
    ShallowerWider(),
    DeeperNarrower(),
    MoreLayers(),
    FewerLayers(),
)
