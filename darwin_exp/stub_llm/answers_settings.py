"""Good answers that change values in settings.json only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from darwin_exp.stub_llm.answers import Answer, Kind, changes
from darwin_exp.stub_llm.source import Code, DoesNotFit, Files, settings_in, with_settings

SCHEDULES = '''\
"""Learning-rate schedules; progress runs from 0 to 1."""

import math


def cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1.0 - progress
'''


def _scaled(files: Files, name: str, factor: float, least: float, most: float) -> dict[str, str]:
    """Multiply a setting; whole numbers stay whole, others keep three digits."""
    present = _number(files, name)
    value = present * factor
    new = round(value) if isinstance(present, int) else float(f"{value:.3g}")
    if not least <= new <= most:
        raise DoesNotFit(f"{name} would be {new}")
    return with_settings(files, **{name: new})


def _other(code: Code, name: str, choices: Sequence[float]) -> dict[str, str]:
    present = _number(code.files, name)
    return with_settings(
        code.files, **{name: code.rng.choice([x for x in choices if x != present])}
    )


def _number(files: Files, name: str) -> float:
    value: Any = settings_in(files).get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DoesNotFit(f"{name} is no number")
    return value


def _shape(files: Files) -> tuple[int, int, int]:
    """Return layers, heads and width."""
    layers, heads, width = (int(_number(files, x)) for x in ("n_layers", "n_heads", "width"))
    if min(layers, heads, width) < 1 or width % heads:
        raise DoesNotFit("the shape is none that attention could use")
    return layers, heads, width


@changes(
    "higher_rate",
    Kind.GOOD,
    "higher peak learning rate",
    "The budget is short, so the run is decided by how far each step goes. The clip and the "
    "warm-up leave room for a larger peak rate.",
    "lower loss if training stays stable",
)
def higher_rate(code: Code) -> dict[str, str]:
    return _scaled(code.files, "learning_rate", code.rng.choice((1.25, 1.5, 2.0)), 1e-5, 3e-2)


@changes(
    "lower_rate",
    Kind.GOOD,
    "lower peak learning rate",
    "Earlier changes may have pushed the rate past what this model bears; a calmer peak loses "
    "little and makes the end of the run cleaner.",
    "steadier training, slightly lower loss",
)
def lower_rate(code: Code) -> dict[str, str]:
    return _scaled(code.files, "learning_rate", code.rng.choice((0.6, 0.75)), 2e-4, 5e-2)


@changes(
    "shorter_warm_up",
    Kind.GOOD,
    "shorter warm-up",
    "Five per cent of a short run is a lot of steps at rates that learn little.",
    "a few more useful steps",
)
def shorter_warm_up(code: Code) -> dict[str, str]:
    present = _number(code.files, "warmup_fraction")
    shorter = [x for x in (0.01, 0.02, 0.03) if x < present]
    if not shorter:
        raise DoesNotFit("it can hardly be shorter")
    return with_settings(code.files, warmup_fraction=code.rng.choice(shorter))


@changes(
    "longer_warm_up",
    Kind.GOOD,
    "longer warm-up",
    "AdamW's second moment is still noise in the first steps. A gentler start keeps the early "
    "updates from throwing the embeddings about.",
    "a calmer start, room for a higher rate later",
)
def longer_warm_up(code: Code) -> dict[str, str]:
    present = _number(code.files, "warmup_fraction")
    longer = [x for x in (0.08, 0.1, 0.15) if x > present]
    if not longer:
        raise DoesNotFit("it is long already")
    return with_settings(code.files, warmup_fraction=code.rng.choice(longer))


@changes(
    "other_betas",
    Kind.GOOD,
    "other AdamW betas",
    "The present memories of the gradient and of its square are tuned for long runs. With a few "
    "hundred steps the averages should follow sooner.",
    "faster adaptation early on",
)
def other_betas(code: Code) -> dict[str, str]:
    present = (_number(code.files, "beta1"), _number(code.files, "beta2"))
    pairs = ((0.9, 0.95), (0.85, 0.95), (0.8, 0.97), (0.95, 0.99), (0.9, 0.98))
    # With one value as it is, only the other would be an edit.
    fitting = [pair for pair in pairs if pair[0] != present[0] and pair[1] != present[1]]
    if not fitting:
        raise DoesNotFit("no pair is wholly another")
    beta1, beta2 = code.rng.choice(fitting)
    return with_settings(code.files, beta1=beta1, beta2=beta2)


@changes(
    "shorter_square_memory",
    Kind.GOOD,
    "shorter memory of the squared gradient",
    "beta2 sets over how many steps the scale of a gradient is averaged; gradients shrink fast "
    "in a short run, and a long memory holds the steps back.",
    "longer steps once gradients have become small",
)
def shorter_square_memory(code: Code) -> dict[str, str]:
    return _other(code, "beta2", (0.95, 0.97, 0.98))


@changes(
    "smaller_batch",
    Kind.GOOD,
    "smaller batch",
    "Within a wall-clock budget more updates beat less noisy ones at this size.",
    "more steps within the budget",
)
def smaller_batch(code: Code) -> dict[str, str]:
    return _scaled(code.files, "batch_size", code.rng.choice((0.5, 0.75)), 1, 4096)


@changes(
    "larger_batch",
    Kind.GOOD,
    "larger batch",
    "Larger matrices use the processor better, and the gradient is quieter, so that the rate "
    "can be used in full.",
    "more tokens a second, fewer steps",
    requests=[
        {
            "type": "resources",
            "reason": "A larger batch only pays where its activations fit into memory.",
            "content": '{"key": "memory_mb", "value": 6144}',
        }
    ],
)
def larger_batch(code: Code) -> dict[str, str]:
    return _scaled(code.files, "batch_size", code.rng.choice((1.5, 2.0)), 1, 256)


@changes(
    "other_clip",
    Kind.GOOD,
    "another gradient clip",
    "The clip decides how long the early steps are. I would like to see whether it holds them "
    "back or whether it has to be tighter for this rate.",
    "either longer early steps or fewer spikes",
    requests=[
        {
            "type": "script",
            "reason": "Schedules would have a file of their own, where each rewrite finds them.",
            "content": json.dumps({"path": "schedules.py", "text": SCHEDULES}),
        }
    ],
)
def other_clip(code: Code) -> dict[str, str]:
    return _other(code, "gradient_clip", (0.5, 1.0, 2.0, 5.0))


@changes(
    "other_decay",
    Kind.GOOD,
    "another weight decay",
    "A run that sees most tokens once does not overfit; decay then acts on the effective rate "
    "only, and the present value is a habit from long runs.",
    "slightly lower loss",
)
def other_decay(code: Code) -> dict[str, str]:
    return _other(code, "weight_decay", (0.01, 0.05, 0.2, 0.3))


@changes(
    "decay_further",
    Kind.GOOD,
    "lower final rate",
    "The last steps should settle the weights before they are scored.",
    "slightly lower final loss",
)
def decay_further(code: Code) -> dict[str, str]:
    present = _number(code.files, "final_rate_fraction")
    lower = [x for x in (0.0, 0.02, 0.05) if x < present]
    if not lower:
        raise DoesNotFit("it decays to nothing already")
    return with_settings(code.files, final_rate_fraction=code.rng.choice(lower))


@changes(
    "more_heads",
    Kind.GOOD,
    "twice as many heads of half the width",
    "With so few layers, more heads can look at more places at once; each needs few channels to "
    "compare letters.",
    "lower loss a step at equal size",
)
def more_heads(code: Code) -> dict[str, str]:
    _, heads, width = _shape(code.files)
    if width % (4 * heads) or width // (2 * heads) < 8:
        raise DoesNotFit("the heads would be too narrow, or odd")
    return with_settings(code.files, n_heads=2 * heads)


@changes(
    "fewer_heads",
    Kind.GOOD,
    "half as many heads of twice the width",
    "Wider heads compare more finely, and fewer of them mean larger matrix products.",
    "slightly faster steps",
)
def fewer_heads(code: Code) -> dict[str, str]:
    _, heads, _ = _shape(code.files)
    if heads % 2:
        raise DoesNotFit("the heads cannot be halved")
    return with_settings(code.files, n_heads=heads // 2)


def _reshaped(files: Files, more_layers: int) -> dict[str, str]:
    """Trade depth for width at about the same number of weights."""
    layers, heads, width = _shape(files)
    new_layers = layers + more_layers
    if not 1 <= new_layers <= 24:
        raise DoesNotFit("no layer can be added or taken away")
    unit = 2 * heads  # heads stay whole and even
    new_width = unit * round(width * (layers / new_layers) ** 0.5 / unit)
    if new_width < unit or new_width > 2 * width:
        raise DoesNotFit("no width fits")
    return with_settings(files, n_layers=new_layers, width=new_width)


@changes(
    "shallower_wider",
    Kind.GOOD,
    "one layer fewer, and wider for it",
    "Short runs make little use of depth, and fewer, larger products run faster.",
    "more tokens a second at equal size",
)
def shallower_wider(code: Code) -> dict[str, str]:
    return _reshaped(code.files, -1)


@changes(
    "deeper_narrower",
    Kind.GOOD,
    "one layer more, and narrower for it",
    "Another layer lets the model compose more, at the same number of weights.",
    "lower loss a token, slightly slower steps",
)
def deeper_narrower(code: Code) -> dict[str, str]:
    return _reshaped(code.files, +1)


@changes(
    "bfloat16",
    Kind.GOOD,
    "bfloat16 autocast",
    "Matrix products in bfloat16 take half the memory traffic; the loss stays in float32.",
    "more steps within the budget where the processor has such units",
)
def bfloat16(code: Code) -> dict[str, str]:
    return with_settings(code.files, precision="bfloat16")


SETTINGS_ANSWERS: tuple[Answer, ...] = (
    higher_rate,
    lower_rate,
    shorter_warm_up,
    longer_warm_up,
    other_betas,
    shorter_square_memory,
    smaller_batch,
    larger_batch,
    other_clip,
    other_decay,
    decay_further,
    more_heads,
    fewer_heads,
    shallower_wider,
    deeper_narrower,
    bfloat16,
)
