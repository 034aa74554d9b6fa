"""Good answers that rewrite train.py only; the job file, the seed and what is saved stay."""

from __future__ import annotations

from darwin_exp.stub_llm.answers import Answer, Kind, changes
from darwin_exp.stub_llm.source import (
    Code,
    DoesNotFit,
    absent,
    insert_after,
    insert_before,
    once,
    once_like,
    parse,
    segment,
    training_loop,
)

_COSINE = "then half a cosine down"
_PARTS_OF_ADAMW = (
    r"^( +)matrices = \[parameter for parameter in model\.parameters\(\) "
    r"if parameter\.dim\(\) >= 2\]\n"
    r" +vectors = \[parameter for parameter in model\.parameters\(\) if parameter\.dim\(\) < 2\]$"
)


def with_decay(text: str, shape: str, about: str) -> str:
    """Return a script whose rate falls as `shape` says, from 1 to 0 as `decayed` goes from 0 to 1.

    Raises:
        DoesNotFit: the rate does not fall from the peak to the lowest in one line, or does so
            in this shape already.
    """
    line = f"return lowest + (settings.learning_rate - lowest) * {shape}"
    absent(text, line)
    text = once_like(text, r"return lowest \+ [^\n]*\bdecayed\b[^\n]*$", line)
    return text.replace(_COSINE, about) if text.count(_COSINE) == 1 else text


def before_training(text: str, code: str) -> str:
    """Return a script that does something right before its training loop."""
    return insert_before(text, training_loop(parse(text)), code)


@changes(
    "z_loss",
    Kind.GOOD,
    "z-loss",
    "Nothing holds the softmax's normaliser in place. A small pull on it keeps the logits from "
    "drifting at high rates (PaLM).",
    "steadier training at high rates",
)
def z_loss(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "logsumexp")
    weight = code.rng.choice(("1e-4", "3e-4", "1e-3"))
    text = once_like(
        text,
        r"^( +)return F\.cross_entropy\("
        r"logits\.flatten\(0, 1\)\.float\(\), targets\.flatten\(\)\)$",
        r"\1logits = logits.flatten(0, 1).float()  # (B * T, V)" + "\n"
        r"\1drift = logits.logsumexp(dim=-1).square().mean()" + "\n"
        rf"\1return F.cross_entropy(logits, targets.flatten()) + {weight} * drift",
    )
    return {"train.py": text}


@changes(
    "weight_average",
    Kind.GOOD,
    "an average of the weights is saved",
    "Single steps cross the valley from side to side; an average over the last of them lies "
    "lower. Only what is saved changes, so training itself costs the same.",
    "lower held-out loss, most of all with rates that stay high",
)
def weight_average(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "average_weights", "WeightAverage")
    text = once(text, "save_file(model.state_dict(), ", "save_file(averaged_state(), ")
    text = once_like(text, r"^( +)optimizer\.step\(\)$", r"\1optimizer.step()\n\1average_weights()")
    made = [
        node
        for node in parse(text).body
        if segment(text, node) == "optimizer = build_optimizer(model)"
    ]
    if len(made) != 1:
        raise DoesNotFit("the optimizer is made in another way")
    power = code.rng.choice((8, 16, 32))
    return {"train.py": insert_after(text, made[0], _AVERAGE.format(power=power))}


_AVERAGE = '''
averages = {{name: weight.detach().clone() for name, weight in model.named_parameters()}}
steps_averaged = 0


@torch.no_grad()
def average_weights() -> None:
    """Move the averages towards the weights; the weight of step t grows like t ** {power}."""
    global steps_averaged
    steps_averaged += 1
    share = 1 - (1 - 1 / steps_averaged) ** ({power} + 1)
    torch._foreach_lerp_(list(averages.values()), list(model.parameters()), share)


def averaged_state() -> dict[str, Tensor]:
    """Return what a checkpoint holds, with the averages in the place of the weights."""
    return {{**model.state_dict(), **averages}}


'''


@changes(
    "linear_schedule",
    Kind.GOOD,
    "the rate falls along a straight line",
    "A cosine spends a third of the run close to its lowest rate. A straight line keeps "
    "learning for longer and still settles.",
    "slightly lower final loss",
)
def linear_schedule(code: Code) -> dict[str, str]:
    text = code.train
    return {"train.py": with_decay(text, "(1.0 - decayed)", "then a straight line down")}


@changes(
    "trapezoid_schedule",
    Kind.GOOD,
    "the rate stays high and falls at the end",
    "Most of the learning is done at the peak rate. Holding it for most of the run and falling "
    "late makes the most of a short budget (warm-up, stable, decay).",
    "lower final loss",
)
def trapezoid_schedule(code: Code) -> dict[str, str]:
    part = code.rng.choice((0.3, 0.4, 0.5))
    shape = f"min(1.0, (1.0 - decayed) / {part})"
    text = code.train
    absent(text, "lowest) * min(1.0, (1.0 - decayed)")
    return {"train.py": with_decay(text, shape, "then level, then a straight line down")}


@changes(
    "root_schedule",
    Kind.GOOD,
    "the rate falls fast at first, then slowly",
    "One minus the root of progress leaves the noisy high rates early and spends the time on "
    "middling ones.",
    "slightly lower final loss where the peak rate is high",
)
def root_schedule(code: Code) -> dict[str, str]:
    text = code.train
    if "import math\n" not in text:
        raise DoesNotFit("math is not imported")
    return {"train.py": with_decay(text, "(1.0 - math.sqrt(decayed))", "then down along a root")}


@changes(
    "no_decay_on_embeddings",
    Kind.GOOD,
    "no weight decay on embeddings",
    "Rows of rare tokens shrink between their uses where they decay, and have to be learnt anew.",
    "slightly lower loss on rare tokens",
)
def no_decay_on_embeddings(code: Code) -> dict[str, str]:
    text = once_like(
        code.train,
        _PARTS_OF_ADAMW,
        r"\1named = list(model.named_parameters())" + "\n"
        r'\1matrices = [p for name, p in named if p.dim() >= 2 and "embedding" not in name]' + "\n"
        r'\1vectors = [p for name, p in named if p.dim() < 2 or "embedding" in name]',
    )
    return {"train.py": text}


@changes(
    "embedding_rate",
    Kind.GOOD,
    "a rate of their own for the embeddings",
    "A row of the embedding is moved only when its token occurs, so it bears another rate than "
    "matrices that every token moves.",
    "lower loss early on",
)
def embedding_rate(code: Code) -> dict[str, str]:
    factor = code.rng.choice((0.5, 2.0, 3.0))
    text = once_like(
        code.train,
        _PARTS_OF_ADAMW,
        r"\1named = list(model.named_parameters())" + "\n"
        r'\1tables = [p for name, p in named if "embedding" in name]' + "\n"
        r'\1matrices = [p for name, p in named if p.dim() >= 2 and "embedding" not in name]' + "\n"
        r'\1vectors = [p for name, p in named if p.dim() < 2 and "embedding" not in name]',
    )
    group = f'"weight_decay": settings.weight_decay, "rate_factor": {factor}'
    text = once_like(
        text,
        r'^( +)\{"params": matrices, "weight_decay": settings\.weight_decay\},$',
        r'\1{"params": matrices, "weight_decay": settings.weight_decay},' + "\n"
        rf'\1{{"params": tables, {group}}},',
    )
    text = once_like(
        text,
        r'^( +)group\["lr"\] = rate$',
        r'\1group["lr"] = rate * group.get("rate_factor", 1.0)',
    )
    return {"train.py": text}


@changes(
    "smaller_epsilon",
    Kind.GOOD,
    "a smaller epsilon in AdamW",
    "Gradients of late layers are small here, and 1e-8 is no longer small beside the root of "
    "their square.",
    "longer steps for weights with small gradients",
)
def smaller_epsilon(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "eps=")
    eps = code.rng.choice(("1e-10", "1e-9", "1e-12"))
    new = rf"torch.optim.AdamW(groups, \1, eps={eps})"
    text = once_like(text, r"torch\.optim\.AdamW\(groups, ([^\n()]+)\)", new)
    return {"train.py": text}


@changes(
    "stratified_starts",
    Kind.GOOD,
    "windows of a batch spread evenly over the text",
    "Independent starts leave stretches of the text out by chance. One start in each of as many "
    "equal stretches makes every batch look like the whole.",
    "a quieter gradient at no cost",
)
def stratified_starts(code: Code) -> dict[str, str]:
    text = once_like(
        code.train,
        r"^( +)starts = torch\.randint\("
        r"len\(tokens\) - context_length, \(settings\.batch_size, 1\)\)\.numpy\(\)$",
        r"\1# One start in each of as many equal stretches of the text as a batch has windows."
        + "\n"
        r"\1places = len(tokens) - context_length" + "\n"
        r"\1chance = torch.rand(settings.batch_size, dtype=torch.float64)" + "\n"
        r"\1stretches = (torch.arange(settings.batch_size) + chance) / settings.batch_size" + "\n"
        r"\1starts = (stretches * places).long().clamp(max=places - 1)[:, None].numpy()",
    )
    return {"train.py": text}


@changes(
    "no_garbage_collection",
    Kind.GOOD,
    "no garbage collection while training",
    "A step leaves no cycles behind, so Python's collector searches in vain, at the worst of "
    "times.",
    "slightly more steps within the budget",
)
def no_garbage_collection(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "import gc", "gc.disable")
    text = once_like(text, r"^import json$", "import gc\nimport json")
    return {"train.py": before_training(text, "gc.collect()\ngc.disable()\n\n")}


@changes(
    "longer_early_clip",
    Kind.GOOD,
    "a looser clip while warming up",
    "The rate is low while it warms up, so that the clip guards nothing there and only makes the "
    "first steps shorter still.",
    "a slightly faster start",
)
def longer_early_clip(code: Code) -> dict[str, str]:
    text = code.train
    factor = code.rng.choice((2.0, 4.0))
    text = once_like(
        text,
        r"^( +)nn\.utils\.clip_grad_norm_\(parameters, settings\.gradient_clip\)$",
        rf"\1slack = {factor} if progress < settings.warmup_fraction else 1.0" + "\n"
        r"\1nn.utils.clip_grad_norm_(parameters, slack * settings.gradient_clip)",
    )
    return {"train.py": text}


TRAINING_ANSWERS: tuple[Answer, ...] = (
    z_loss,
    weight_average,
    linear_schedule,
    trapezoid_schedule,
    root_schedule,
    no_decay_on_embeddings,
    embedding_rate,
    smaller_epsilon,
    stratified_starts,
    no_garbage_collection,
    longer_early_clip,
)
