"""Which answer is given to which prompt: the models, their temperaments and the draw.

Reads: the messages of a request and the model's name.
Writes: nothing.
Never: remembers a request; the same messages to the same model get the same answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from darwin_exp.stub_llm.answers import Answer, Completion, Kind
from darwin_exp.stub_llm.answers_broken import BROKEN_ANSWERS
from darwin_exp.stub_llm.answers_good import GOOD_ANSWERS
from darwin_exp.stub_llm.answers_unusable import UNUSABLE_ANSWERS
from darwin_exp.stub_llm.answers_useless import USELESS_ANSWERS, no_edits
from darwin_exp.stub_llm.prompts import Prompt
from darwin_exp.stub_llm.repairs import CURES, WRONG_REPAIRS
from darwin_exp.stub_llm.source import DoesNotFit

DRAFTS: tuple[Answer, ...] = (*GOOD_ANSWERS, *USELESS_ANSWERS, *UNUSABLE_ANSWERS, *BROKEN_ANSWERS)
REPAIRS: tuple[Answer, ...] = (*CURES, *WRONG_REPAIRS)
ANSWERS: Mapping[str, Answer] = {answer.name: answer for answer in (*DRAFTS, *REPAIRS)}


@dataclass(frozen=True)
class Temperament:
    """What a model tends to.

    Attributes:
        shares: how often its first drafts are of each kind, in relation to one another.
        heeding: share of answers to an objection that are good ones.
        curing: share of repairs that are right where the prompt says enough for it.
    """

    about: str
    shares: Mapping[Kind, float]
    heeding: float
    curing: float


def _shares(
    good: float, useless: float, malformed: float, refusal: float, broken: float
) -> dict[Kind, float]:
    return {
        Kind.GOOD: good,
        Kind.USELESS: useless,
        Kind.MALFORMED: malformed,
        Kind.REFUSAL: refusal,
        Kind.BROKEN: broken,
    }


MODELS: Mapping[str, Temperament] = {
    "stub-careful": Temperament(
        "mostly good changes, and every repair that the log allows",
        _shares(good=72, useless=5, malformed=5, refusal=2, broken=16),
        heeding=0.95,
        curing=1.0,
    ),
    "stub-bold": Temperament(
        "good changes and broken code in equal parts",
        _shares(good=45, useless=5, malformed=8, refusal=2, broken=40),
        heeding=0.85,
        curing=0.8,
    ),
    "stub-sloppy": Temperament(
        "answers that are often useless, unreadable or broken",
        _shares(good=25, useless=15, malformed=22, refusal=8, broken=30),
        heeding=0.7,
        curing=0.5,
    ),
}


class Author:
    """Writes the answers of all models.

    Args:
        seed: another one gives other answers to the same messages.
        only: names of answers; where a draft is among them, drafts are drawn from those alone,
            and where a repair is, repairs are.
        without: kinds that are never drawn.

    Raises:
        ValueError: a name that no answer has.
    """

    def __init__(
        self, seed: int = 0, only: Collection[str] = (), without: Collection[Kind] = ()
    ) -> None:
        if unknown := sorted(set(only) - ANSWERS.keys()):
            raise ValueError(f"there is no answer {', '.join(unknown)}; --list shows them all")
        self._seed = seed
        self._drafts = _chosen(DRAFTS, only, without)
        self._repairs = _chosen(REPAIRS, only, without)

    def answer(
        self, model: str, messages: Sequence[Mapping[str, Any]], form: str = "edits"
    ) -> Completion:
        """Return a model's answer to a conversation.

        Args:
            form: of the answer where the messages do not name one.

        Raises:
            KeyError: there is no such model.
        """
        temperament = MODELS[model]
        rng = Random(self._digest(model, messages))
        prompt = Prompt.of(messages, form)
        order = self._repairs_for if prompt.failure is not None else self._drafts_for
        for answer in order(prompt, temperament, rng):
            try:
                return answer.write(prompt, rng)
            except DoesNotFit:
                continue
        try:
            return no_edits.write(prompt, rng)
        except DoesNotFit:  # a chunk is asked for, and none is shown
            return Completion("nothing_to_answer", "I cannot see any code to work on.")

    def _digest(self, model: str, messages: Sequence[Mapping[str, Any]]) -> int:
        text = json.dumps([self._seed, model, list(messages)], sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest())

    def _drafts_for(
        self, prompt: Prompt, temperament: Temperament, rng: Random
    ) -> Iterator[Answer]:
        """Yield a kind's answers in random order, and good ones where none of them fits."""
        of_kind = {
            kind: [answer for answer in self._drafts if answer.kind is kind]
            for kind in temperament.shares
        }
        heeding = prompt.objected and rng.random() < temperament.heeding
        present = [kind for kind, answers in of_kind.items() if answers]
        if heeding and of_kind[Kind.GOOD]:
            drawn = Kind.GOOD
        elif present:
            weights = [temperament.shares[kind] for kind in present]
            drawn = rng.choices(present, weights)[0]
        else:
            return
        for kind in (drawn, Kind.GOOD, *present):
            yield from rng.sample(of_kind[kind], len(of_kind[kind]))

    def _repairs_for(
        self, prompt: Prompt, temperament: Temperament, rng: Random
    ) -> Iterator[Answer]:
        """Yield right cures first where this one shall be right, and then wrong ones."""
        if rng.random() < temperament.curing:
            yield from (answer for answer in self._repairs if answer.kind is Kind.REPAIR)
        wrong = [answer for answer in self._repairs if answer.kind is Kind.WRONG_REPAIR]
        yield from rng.sample(wrong, len(wrong))


def _chosen(
    answers: Sequence[Answer], only: Collection[str], without: Collection[Kind]
) -> list[Answer]:
    named = [answer for answer in answers if answer.name in only]
    return [answer for answer in named or answers if answer.kind not in without]
