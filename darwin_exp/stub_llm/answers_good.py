"""The good answers: those of one file, listed here with those that change several together."""

from __future__ import annotations

from darwin_exp.stub_llm.answers import Answer, Kind, changes
from darwin_exp.stub_llm.answers_model import MODEL_ANSWERS
from darwin_exp.stub_llm.answers_settings import SETTINGS_ANSWERS
from darwin_exp.stub_llm.answers_training import TRAINING_ANSWERS, with_decay
from darwin_exp.stub_llm.model_source import at_end_of_init, normalised_queries_and_keys
from darwin_exp.stub_llm.source import (
    Code,
    DoesNotFit,
    absent,
    once,
    once_like,
    settings_in,
    with_settings,
)


@changes(
    "untied_zero_head",
    Kind.GOOD,
    "an output head of its own that starts at zero",
    "Reading tokens and predicting them are different jobs. With a small vocabulary a second "
    "matrix is cheap, and from zero it starts with even predictions.",
    "lower loss for hardly more work",
)
def untied_zero_head(code: Code) -> dict[str, str]:
    text = code.model
    absent(text, "zeros_(self.head.weight)")
    once(text, "self.head = nn.Linear(", "self.head = nn.Linear(")  # there is one to untie
    added = """
    if not config.tied_head:
        nn.init.zeros_(self.head.weight)  # at first every token is as likely as any other
    """
    return {"model.py": at_end_of_init(text, added), **with_settings(code.files, tied_head=False)}


@changes(
    "qk_norm_and_rate",
    Kind.GOOD,
    "normalised queries and keys, and a higher rate",
    "Bounded attention scores are worth little by themselves; what they buy is a higher rate, so "
    "the two belong together.",
    "lower loss within the budget",
)
def qk_norm_and_rate(code: Code) -> dict[str, str]:
    rate = settings_in(code.files).get("learning_rate")
    if not isinstance(rate, float) or rate > 2e-2:
        raise DoesNotFit("the rate is high already")
    new = float(f"{rate * code.rng.choice((1.3, 1.6)):.3g}")
    model = normalised_queries_and_keys(code.model)
    return {"model.py": model, **with_settings(code.files, learning_rate=new)}


@changes(
    "linear_to_zero",
    Kind.GOOD,
    "the rate falls along a straight line, all the way to zero",
    "A straight line to zero beats a cosine to a tenth over many model sizes; the two changes "
    "only make sense together.",
    "lower final loss",
)
def linear_to_zero(code: Code) -> dict[str, str]:
    text = with_decay(code.train, "(1.0 - decayed)", "then a straight line down")
    return {"train.py": text, **with_settings(code.files, final_rate_fraction=0.0)}


@changes(
    "hidden_ratio",
    Kind.GOOD,
    "the MLP's hidden width as a setting",
    "Four times the width is a habit. As a setting it can be traded against depth and width, "
    "and it goes through model.json so that the model is rebuilt as it was trained.",
    "another balance of speed and loss a step",
)
def hidden_ratio(code: Code) -> dict[str, str]:
    model, train = code.model, code.train
    settings = code.settings
    for text in (model, train, settings):
        absent(text, "hidden_ratio")
    ratio = "config.hidden_ratio * config.width"
    model = once(
        model, "nn.Linear(config.width, 4 * config.width", f"nn.Linear(config.width, {ratio}"
    )
    model = once(
        model, "nn.Linear(4 * config.width, config.width", f"nn.Linear({ratio}, config.width"
    )
    described = r"^( +)width: channels of the residual stream[^\n]*$"
    field = r"^    width: int$"
    model, train = (
        once_like(
            once_like(text, field, "    width: int\n    hidden_ratio: int"),
            described,
            r"\g<0>" + "\n" + r"\1hidden_ratio: width of an MLP's hidden layer, in widths.",
        )
        for text in (model, train)
    )
    train = once_like(
        train,
        r'^( +)"width": settings\.width,$',
        r"\g<0>" + "\n" + r'\1"hidden_ratio": settings.hidden_ratio,',
    )
    settings = once_like(
        settings,
        r'^( *)"width": \d+,$',
        r"\g<0>" + "\n" + rf'\1"hidden_ratio": {code.rng.choice((2, 3, 5))},',
    )
    return {"model.py": model, "train.py": train, "settings.json": settings}


GOOD_ANSWERS: tuple[Answer, ...] = (
    *SETTINGS_ANSWERS,
    *MODEL_ANSWERS,
    *TRAINING_ANSWERS,
    untied_zero_head,
    qk_norm_and_rate,
    linear_to_zero,
    hidden_ratio,
)
