"""Broken answers: they apply, and then the code fails, each in a way of its own.

Most pass a smoke run of a few steps or not as such mistakes do in earnest: a name that is only
used late, a shape that fits on one side, a loop that forgets to count.
"""

from __future__ import annotations

from darwin_exp.stub_llm.answers import Answer, Change, Kind, changes
from darwin_exp.stub_llm.answers_training import before_training
from darwin_exp.stub_llm.source import (
    Code,
    DoesNotFit,
    absent,
    calls,
    once,
    once_like,
    parse,
    settings_in,
    with_settings,
)


def _with_another_clip(mistake: Change) -> Change:
    """Let a mistake come with a change that has nothing to do with it, as most mistakes do.

    Its cure is then no way back to the parent's code, which would be no rewrite at all.
    """

    def both(code: Code) -> dict[str, str]:
        changed = mistake(code)
        if "settings.json" not in code.files:  # only a chunk is asked for
            return changed
        files = {**code.files, **changed}
        clip = settings_in(files).get("gradient_clip")
        if not isinstance(clip, int | float):
            raise DoesNotFit("there is no gradient clip")
        fresh = round(clip * code.rng.uniform(0.6, 1.6), 4)  # hardly ever the same twice
        return {**changed, **with_settings(files, gradient_clip=fresh)}

    return both


@changes(
    "name_error",
    Kind.BROKEN,
    "leaner warm-up code",
    "The warm-up reads the same attribute twice in every step; a plain name is enough.",
    "slightly faster steps",
)
@_with_another_clip
def name_error(code: Code) -> dict[str, str]:
    text = code.train
    old, new = "if progress < settings.warmup_fraction:", "if progress < warmup_fraction:"
    return {"train.py": once(text, old, new)}


@changes(
    "late_name_error",
    Kind.BROKEN,
    "a calmer last stretch",
    "After seventy per cent of the run the rate is only noise; it should settle sooner.",
    "lower final loss",
)
@_with_another_clip
def late_name_error(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "settle_factor")
    text = once_like(
        text,
        r"^( +)rate = learning_rate\(progress\)$",
        r"\1rate = learning_rate(progress)" + "\n"
        r"\1if progress > 0.7:" + "\n"
        r"\1    rate *= settle_factor",
    )
    return {"train.py": text}


@changes(
    "wrong_shape",
    Kind.BROKEN,
    "a wider attention output",
    "The output projection is the narrowest part of a block; it should see twice the channels.",
    "lower loss a step",
)
@_with_another_clip
def wrong_shape(code: Code) -> dict[str, str]:
    text = code.model
    old = "self.projection = nn.Linear(config.width, config.width"
    return {"model.py": once(text, old, old.replace("(config", "(2 * config"))}


@changes(
    "wrong_keyword",
    Kind.BROKEN,
    "momentum in the optimizer",
    "More momentum smooths the noisy gradients of a small batch.",
    "steadier training",
)
@_with_another_clip
def wrong_keyword(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "momentum=")
    pattern = r"torch\.optim\.AdamW\(groups, ([^\n()]+)\)"
    return {"train.py": once_like(text, pattern, r"torch.optim.AdamW(groups, \1, momentum=0.95)")}


@changes(
    "missing_import",
    Kind.BROKEN,
    "einops for the heads",
    "Joining the heads with transpose and reshape is hard to read; rearrange says what it does.",
    "the same loss, clearer code",
)
@_with_another_clip
def missing_import(code: Code) -> dict[str, str]:
    text = once(
        code.model,
        "y = y.transpose(1, 2).reshape(B, T, C)",
        'y = rearrange(y, "b h t d -> b t (h d)")',
    )
    pattern = r"^import torch\.nn\.functional as F$"
    new = "import torch.nn.functional as F\nfrom einops import rearrange"
    return {"model.py": once_like(text, pattern, new)}


@changes(
    "indentation",
    Kind.BROKEN,
    "the rate is set before each step",
    "The rate has to be known before the first forward pass of a step.",
    "the same loss",
)
@_with_another_clip
def indentation(code: Code) -> dict[str, str]:
    text = code.train
    pattern = r"^( +)rate = learning_rate\(progress\)$"
    return {"train.py": once_like(text, pattern, r"\1 rate = learning_rate(progress)")}


@changes(
    "endless_loop",
    Kind.BROKEN,
    "warm-up passes before the clock matters",
    "The first passes are slow because nothing is in the cache; a few of them ahead of training "
    "keep the schedule honest.",
    "steadier step times",
)
@_with_another_clip
def endless_loop(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "warming up for")
    added = """
    passes = 0
    print("warming up for 20 passes", flush=True)
    while passes < 20:
        with torch.no_grad(), autocast:
            network(inputs)

    """
    return {"train.py": before_training(text, added)}


@changes(
    "out_of_memory",
    Kind.BROKEN,
    "statistics of every pair of histories",
    "Which histories lead to the same token tells how much the model could know at best.",
    "a basis for later changes",
)
@_with_another_clip
def out_of_memory(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "pairs_of_histories")
    # More than any address space holds, so that it fails at once on every machine.
    added = "pairs_of_histories = torch.zeros(10_000_000, 100_000_000)\n\n"
    return {"train.py": before_training(text, added)}


@changes(
    "late_crash",
    Kind.BROKEN,
    "a running mean of the loss in the log",
    "The loss of a single step is too noisy to judge a run by.",
    "better insight into training",
)
@_with_another_clip
def late_crash(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "recent_losses")
    text = once_like(
        text,
        r"^( +)step \+= 1$",
        r"\1step += 1" + "\n"
        r"\1recent_losses = [*recent_losses[-7:], loss.detach()]" + "\n"
        r"\1if step % 8 == 0:" + "\n"
        r'\1    print(f"mean loss {torch.stack(recent_losses).mean(dim=1):.4f}", flush=True)',
    )
    return {"train.py": before_training(text, "recent_losses: list[Tensor] = []\n\n")}


@changes(
    "no_checkpoint",
    Kind.BROKEN,
    "clearer names for what is saved",
    "The file holds weights and nothing else, so it should be called that.",
    "the same loss",
)
@_with_another_clip
def no_checkpoint(code: Code) -> dict[str, str]:
    text = once_like(
        code.train,
        r'^( +)os\.replace\(unfinished, out / "model\.safetensors"\)$',
        r'\1os.replace(unfinished, out / "weights.safetensors")' + "\n"
        r'\1print("saved weights.safetensors", flush=True)',
    )
    return {"train.py": text}


@changes(
    "non_causal",
    Kind.BROKEN,
    "attention without a mask",
    "Half of the attention matrix is thrown away. Without the mask every position can use all "
    "of the context.",
    "much lower loss",
)
@_with_another_clip
def non_causal(code: Code) -> dict[str, str]:
    text = code.model
    if not calls(parse(text), "scaled_dot_product_attention"):
        raise DoesNotFit("there is no such attention")
    return {"model.py": once(text, "is_causal=True", "is_causal=False")}


@changes(
    "exploding_rate",
    Kind.BROKEN,
    "the highest rate there is",
    "AdamW normalises its steps, so the rate may be as large as the number format allows.",
    "much faster training",
)
@_with_another_clip
def exploding_rate(code: Code) -> dict[str, str]:
    if settings_in(code.files).get("precision") != "float32":
        raise DoesNotFit("that number format has not been thought through")
    # Beyond float32: the first step at any such rate leaves infinities, and the next one NaN.
    return with_settings(code.files, learning_rate=1e39)


@changes(
    "no_build_model",
    Kind.BROKEN,
    "a shorter name for the model's constructor",
    "The function makes a model, so it should be called make_model.",
    "the same loss",
)
@_with_another_clip
def no_build_model(code: Code) -> dict[str, str]:
    text = code.model
    return {"model.py": once(text, "def build_model(", "def make_model(")}


BROKEN_ANSWERS: tuple[Answer, ...] = (
    name_error,
    late_name_error,
    wrong_shape,
    wrong_keyword,
    missing_import,
    indentation,
    endless_loop,
    out_of_memory,
    late_crash,
    no_checkpoint,
    non_causal,
    exploding_rate,
    no_build_model,
)
