"""Repairs: the right cure for each failure that a broken answer causes, and wrong ones.

A right cure needs the evidence: the traceback in the quoted end of the log or, where nothing was
raised, what the run printed and the status. A prompt that does not quote the log gets a wrong
repair at best, which is how a missing traceback would show.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from darwin_exp.genome import lines_of
from darwin_exp.stub_llm.answers import (
    Answer,
    Change,
    Completion,
    Kind,
    as_json,
    changes,
    worded,
)
from darwin_exp.stub_llm.prompts import Prompt
from darwin_exp.stub_llm.source import (
    Code,
    DoesNotFit,
    insert_before,
    once,
    once_like,
    parse,
    segment,
    training_loop,
    with_settings,
)

_TRACEBACK = "Traceback (most recent call last)"


def _cure(
    name: str, evidence: str, summary: str, why: str, status: str = ""
) -> Callable[[Change], Answer]:
    """Make a cure into an answer that is only given on its evidence.

    Args:
        evidence: pattern that the quoted log matches; the cure gets the last match's word.
        status: what the status says, where the log alone cannot tell.
    """

    def answer_with(cure: Change) -> Answer:
        def write(prompt: Prompt, rng: Random) -> Completion:
            failure = prompt.failure
            if failure is None or not failure.log or status not in failure.status:
                raise DoesNotFit("nothing says what went wrong")
            found = list(re.finditer(evidence, failure.log))
            # A message may name the exception too, but only the traceback says where it was.
            if not found or ("Error: " in evidence and _TRACEBACK not in failure.log):
                raise DoesNotFit("something else went wrong")
            told = {
                "reasoning": why,
                "summary": summary,
                "expected_effect": "the run ends with a checkpoint",
                "requests": [],
            }
            word, log = found[-1][found[-1].re.groups], failure.log  # its group, or all of it
            return worded(name, prompt, lambda files: cure(Code(files, rng, log, word)), told)

        return Answer(name, Kind.REPAIR, summary, write)

    return answer_with


@_cure(
    "cure_name_error",
    r"NameError: name '(\w+)' is not defined",
    "the setting is read from the settings",
    "The traceback names a setting that is used without `settings.` before it.",
)
def cure_name_error(code: Code) -> dict[str, str]:
    name, text = code.evidence, code.train
    bare = rf"(?<![\w.\"]){name}\b(?!\")"
    places = re.findall(r'train\.py", line (\d+)', code.log)
    lines = lines_of(text)
    at = int(places[-1]) - 1 if places else -1
    if 0 <= at < len(lines) and re.search(bare, lines[at]):
        if not re.search(rf"^    {name}: ", text, re.MULTILINE):
            raise DoesNotFit(f"there is no setting {name}")
        lines[at] = re.sub(bare, f"settings.{name}", lines[at])
        return {"train.py": "".join(lines)}
    if f"settings.{name}" not in text:
        raise DoesNotFit(f"there is no setting {name}")
    return {"train.py": once_like(text, bare, f"settings.{name}")}


@_cure(
    "cure_late_name_error",
    r"NameError: name 'settle_factor' is not defined",
    "the factor of the last stretch is defined",
    "The traceback shows that `settle_factor` is used in the loop and defined nowhere.",
)
def cure_late_name_error(code: Code) -> dict[str, str]:
    text = code.train
    added = "settle_factor = 0.5\n\n"
    return {"train.py": insert_before(text, training_loop(parse(text)), added)}


@_cure(
    "cure_wrong_shape",
    r"RuntimeError: mat1 and mat2 shapes cannot be multiplied \(\d+x\d+ and \d+x\d+\)",
    "the output projection takes what the heads give",
    "The shapes in the traceback differ by a factor of two: attention gives as many channels as "
    "it gets, and the projection expects twice as many.",
)
def cure_wrong_shape(code: Code) -> dict[str, str]:
    old = "self.projection = nn.Linear(2 * config.width, config.width"
    return {"model.py": once(code.model, old, old.replace("2 * ", ""))}


@_cure(
    "cure_wrong_keyword",
    r"TypeError: \w+\.__init__\(\) got an unexpected keyword argument '(\w+)'",
    "an argument that the optimizer does not know is gone",
    "The traceback says that the optimizer takes no such keyword.",
)
def cure_wrong_keyword(code: Code) -> dict[str, str]:
    return {"train.py": once_like(code.train, rf", {code.evidence}=[^,()\n]+", "")}


@_cure(
    "cure_missing_import",
    r"ModuleNotFoundError: No module named 'einops'",
    "the heads are joined without einops",
    "The traceback shows that einops is not installed, and nothing can be.",
)
def cure_missing_import(code: Code) -> dict[str, str]:
    text = once_like(code.model, r"^from einops import rearrange\n", "")
    old = 'y = rearrange(y, "b h t d -> b t (h d)")'
    return {"model.py": once(text, old, "y = y.transpose(1, 2).reshape(B, T, C)")}


@_cure(
    "cure_endless_loop",
    r"warming up for \d+ passes",
    "the warm-up passes are counted",
    "The log ends with the warm-up: its loop never counts a pass, so it never ends.",
    status="TIMED_OUT",
)
def cure_endless_loop(code: Code) -> dict[str, str]:
    old = "    with torch.no_grad(), autocast:\n        network(inputs)\n"
    return {"train.py": once(code.train, old, f"{old}    passes += 1\n")}


@_cure(
    "cure_out_of_memory",
    r"Error: [^\n]*(?:can't allocate memory|not enough memory|out of memory)",
    "the table of histories is gone",
    "The traceback ends where a table of all pairs of histories is made, which nothing reads.",
)
def cure_out_of_memory(code: Code) -> dict[str, str]:
    text = code.train
    return {"train.py": once_like(text, r"^pairs_of_histories = [^\n]*\n\n?", "")}


@_cure(
    "cure_late_crash",
    r"IndexError: Dimension out of range",
    "the mean is taken over the only dimension",
    "The stacked losses have one dimension, and the traceback shows a mean over a second one.",
)
def cure_late_crash(code: Code) -> dict[str, str]:
    text = code.train
    return {"train.py": once(text, "(recent_losses).mean(dim=1)", "(recent_losses).mean()")}


@_cure(
    "cure_no_checkpoint",
    r"saved weights\.safetensors",
    "the weights are saved under the contract's name",
    "The log says that weights were saved, but under a name that nobody looks for.",
    status="no_checkpoint",
)
def cure_no_checkpoint(code: Code) -> dict[str, str]:
    text = code.train
    for place in ('out / "weights.safetensors"', '"saved weights.safetensors"'):
        text = once(text, place, place.replace("weights", "model"))
    return {"train.py": text}


@_cure(
    "cure_non_causal",
    r"step +\d+ +loss",
    "attention is causal again",
    "The model was turned down because it sees what comes later: its mask is off.",
    status="causality",
)
def cure_non_causal(code: Code) -> dict[str, str]:
    text = code.model
    return {"model.py": once(text, "is_causal=False", "is_causal=True")}


@_cure(
    "cure_exploding_rate",
    r"loss (nan|inf)\b",
    "a rate that training survives",
    "The log shows a loss that is no number: the rate is far too high.",
)
def cure_exploding_rate(code: Code) -> dict[str, str]:
    return with_settings(code.files, learning_rate=0.002)


@_cure(
    "cure_no_build_model",
    r"ImportError: cannot import name '(\w+)' from 'model'",
    "the model is built by build_model again",
    "The traceback shows that train.py, like the harness, asks for build_model by its name.",
)
def cure_no_build_model(code: Code) -> dict[str, str]:
    text = code.model
    return {"model.py": once(text, "def make_model(", f"def {code.evidence}(")}


# The more particular name error first: both of them fit its evidence, but not its code.
CURES: tuple[Answer, ...] = (
    cure_late_name_error,
    cure_name_error,
    cure_wrong_shape,
    cure_wrong_keyword,
    cure_missing_import,
    cure_endless_loop,
    cure_out_of_memory,
    cure_late_crash,
    cure_no_checkpoint,
    cure_non_causal,
    cure_exploding_rate,
    cure_no_build_model,
)


@changes(
    "repair_beside_the_point",
    Kind.WRONG_REPAIR,
    "the report says where it comes from",
    "The crash most likely comes from the log being mixed up, so its lines should be marked.",
    "the run no longer crashes",
)
def repair_beside_the_point(code: Code) -> dict[str, str]:
    text = code.train
    pattern = r'^( +)print\(f"step \{step:6d\}'
    return {"train.py": once_like(text, pattern, r'\1print(f"training: step {step:6d}')}


@changes(
    "repair_makes_it_worse",
    Kind.WRONG_REPAIR,
    "a check before training starts",
    "Something is inconsistent between the settings and the model; a check will find it.",
    "the run no longer crashes",
)
def repair_makes_it_worse(code: Code) -> dict[str, str]:
    text = code.train
    tree = parse(text)
    made = [node for node in tree.body if segment(text, node).startswith("parameters = list(")]
    if len(made) != 1:
        raise DoesNotFit("the parameters are listed in another way")
    added = 'assert model.n_parameters == settings.n_parameters, "the model has another size"\n'
    return {"train.py": insert_before(text, made[0], added)}


def _repair_that_does_not_apply(prompt: Prompt, _: Random) -> Completion:
    name = "repair_does_not_apply"
    told = {
        "reasoning": "The gradient scaler has to be updated after the step.",
        "summary": "the scaler is updated",
        "expected_effect": "the run no longer crashes",
        "requests": [],
    }
    if prompt.form not in ("edits", "text"):
        return worded(name, prompt, lambda _: {}, told)
    edit = {
        "file": "train.py",
        "search": "scaler.step(optimizer)\n",
        "replace": "scaler.update()\n",
    }
    return Completion(name, as_json({**told, "edits": [edit]}), is_data=True)


WRONG_REPAIRS: tuple[Answer, ...] = (
    repair_beside_the_point,
    repair_makes_it_worse,
    Answer(
        "repair_does_not_apply",
        Kind.WRONG_REPAIR,
        "an edit of code that is not there",
        _repair_that_does_not_apply,
    ),
)
