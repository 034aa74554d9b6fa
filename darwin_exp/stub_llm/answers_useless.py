"""Useless answers: they can be read and applied, and change nothing that matters."""

from __future__ import annotations

import ast
import re

from darwin_exp.stub_llm.answers import Answer, Kind, changes
from darwin_exp.stub_llm.source import (
    Code,
    DoesNotFit,
    absent,
    function,
    insert_before,
    once,
    once_like,
    parse,
    segment,
    spliced,
    text_at,
    training_loop,
)


@changes(
    "comment_only",
    Kind.USELESS,
    "clearer structure",
    "Before changing how the model trains, the code should say what it does.",
    "better maintainability",
)
def comment_only(code: Code) -> dict[str, str]:
    path = code.rng.choice(
        [path for path in sorted(code.files) if path.endswith(".py")] or ["train.py"]
    )
    text = text_at(code.files, path)
    places = [n for n in parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    if not places:
        raise DoesNotFit(f"{path} defines nothing")
    return {
        path: insert_before(text, code.rng.choice(places), "# This part matters for the speed.\n")
    }


@changes(
    "docstring_only",
    Kind.USELESS,
    "better documentation",
    "The module's description does not mention how to tune it.",
    "easier tuning later",
)
def docstring_only(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "Tune the rate first")
    if not ast.get_docstring(parse(text)):
        raise DoesNotFit("there is no docstring")
    added = "\n\nTune the rate first and the batch next.\n"
    return {"train.py": once_like(text, r'\A("""[^\n]+\.)\n', rf"\1{added}")}


@changes(
    "renamed_variable",
    Kind.USELESS,
    "a more telling name for the loss",
    "`nats` says what the unit is and not what the value is.",
    "more readable code",
)
def renamed_variable(code: Code) -> dict[str, str]:
    text = code.train
    report = function(parse(text), "report")
    source = segment(text, report)
    if not re.search(r"\bnats\b", source):
        raise DoesNotFit("there is no such name")
    return {"train.py": spliced(text, (report, re.sub(r"\bnats\b", "loss_in_nats", source)))}


@changes(
    "seed_only",
    Kind.USELESS,
    "a luckier seed",
    "1337 has worked well for small GPTs.",
    "lower loss",
)
def seed_only(code: Code) -> dict[str, str]:
    text = code.train
    seed = code.rng.choice((42, 1337, 3407))
    old = 'torch.manual_seed(job["seed"])'
    return {"train.py": once(text, old, f"torch.manual_seed({seed})")}


@changes(
    "same_value",
    Kind.USELESS,
    "a finer value for beta1",
    "The present value of beta1 is too coarse, so I state it with more digits.",
    "more precise updates",
)
def same_value(code: Code) -> dict[str, str]:
    text = code.settings
    return {"settings.json": once_like(text, r'("beta1"\s*:\s*\d+\.\d+)', r"\g<1>0")}


@changes(
    "extra_logging",
    Kind.USELESS,
    "more logging",
    "It is hard to see from the log whether the run is healthy.",
    "better insight into training",
)
def extra_logging(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "training begins")
    shown = (
        'print(f"training begins with {sum(p.numel() for p in parameters)} weights", flush=True)'
    )
    return {"train.py": insert_before(text, training_loop(parse(text)), f"{shown}\n\n")}


@changes(
    "unused_function",
    Kind.USELESS,
    "preparation for adaptive clipping",
    "To clip by the gradient's history its length must be known first.",
    "none by itself; it prepares the next change",
)
def unused_function(code: Code) -> dict[str, str]:
    text = code.train
    absent(text, "def gradient_length")
    added = '''
    def gradient_length(model: nn.Module) -> float:
        """Return the length of the gradient over all weights."""
        squares = [p.grad.square().sum().item() for p in model.parameters() if p.grad is not None]
        return math.sqrt(sum(squares))


    '''
    return {"train.py": insert_before(text, function(parse(text), "loss_of"), added)}


@changes(
    "no_edits",
    Kind.USELESS,
    "no change",
    "The code is well balanced as it is; any change I can think of is as likely to hurt.",
    "none",
)
def no_edits(_: Code) -> dict[str, str]:
    return {}


USELESS_ANSWERS: tuple[Answer, ...] = (
    comment_only,
    docstring_only,
    renamed_variable,
    seed_only,
    same_value,
    extra_logging,
    unused_function,
    no_edits,
)
