"""The report's section on language models: what was asked, what became of it, and what it cost."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import pytest

from darwin_exp.chronicle import Chronicle
from darwin_exp.protocols import Event
from darwin_exp.report.exchanges import LONGEST, SHOWN, Exchanges, exchanges
from darwin_exp.report.facts import Facts, gather
from darwin_exp.report.page import render
from tests.report.long_journal import LongJournal

MODELS = (
    {"name": "gpt-4o-mini", "base_url": "https://api.example.test/v1", "temperature": None},
    {"name": "qwen-coder", "base_url": "http://127.0.0.1:8000/v1", "temperature": 0.8},
)
HOSTILE = "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)>\u202e{{ 7 * 7 }}"


class AskingJournal(LongJournal):
    """A long journal whose rewrites were written by language models, in real events.

    Every third individual had a draft turned down before; every fifth met a rate limit first.

    Args:
        said: stands in every prompt and answer.
        form: the title of the answers' schema; the chunks of one attempt are used together.
        priced: whether the second model has a price.
    """

    def __init__(
        self, folder: Path, *arguments: Any, said: str = "", form: str = "edits", **more: Any
    ) -> None:
        self.said, self.form = said, form
        self.is_priced = bool(more.pop("priced", True))
        self.n_asked = 0
        self.draws = Random(1)
        super().__init__(folder, *arguments, **more)

    def _begin(self) -> None:
        plain = self.append

        def append(
            kind: str,
            key: str,
            payload: Mapping[str, Any],
            measured: Mapping[str, Any] | None = None,
        ) -> Event:
            if kind == "proposal" and payload.get("edits"):
                *old, last = payload["edits"]
                payload = {**payload, "edits": [*old, {**last, "parameters": self.made_by(key)}]}
            return plain(kind, key, payload, measured)

        self.append = append
        super()._begin()

    def _one(self, generation: int, slot: int, parent: str) -> None:
        name = f"g{generation:02d}-i{slot:02d}"
        model = self.draws.choice(MODELS)
        messages = [["system", "You edit training code."], ["user", f"rewrite {name} {self.said}"]]
        if self.n_asked % 5 == 0:
            self.fail(f"{name}/0/0.0", model, "rate_limited", 429)
        self.answer(f"{name}/0/0", model, messages, f"answer to {name} {self.said}")
        if self.n_asked % 3 == 0:
            self.go_on(f"{name}/0/1", model, messages, f"answer to {name} {self.said}")
        self.n_asked += 1
        super()._one(generation, slot, parent)

    def made_by(self, attempt: str) -> dict[str, Any]:
        """Return what the last edit of a rewrite says of the calls that made it."""
        n = 1 + ((self.n_asked - 1) % 3 == 0)
        if self.form == "chunk":
            return {"exchange": f"{attempt}/0", "calls": n}
        return {"exchange": f"{attempt}/{n - 1}"}

    def go_on(self, query: str, model: Any, messages: list[list[str]], text: str) -> None:
        again = [*messages, ["assistant", text], ["user", f"objection to {query}"]]
        self.answer(query, model, again, f"better answer to {query}")

    def reserve(self, key: str, model: Any) -> None:
        payload: dict[str, Any] = {"individual_id": key.split("/")[0]}
        payload["model"] = {**model, "key_env": "K"}
        payload |= {"prompt_sha256": "0" * 64, "tokens": 3000, "usd": 0.01}
        self.append("llm_reserved", key, payload)

    def fail(self, key: str, model: Any, kind: str, status: int | None, **more: Any) -> None:
        self.reserve(key, model)
        payload = {"status": status, "kind": kind, "message": "no", **more}
        self.append("llm_failed", key, payload, {"seconds": 0.1})

    def answer(self, query: str, model: Any, messages: list[list[str]], text: str) -> None:
        tries = 1 + (self.n_asked % 5 == 0 and query.endswith("/0/0"))
        self.reserve(f"{query}.{tries - 1}", model)
        is_free = model is MODELS[1] and not self.is_priced
        payload = {
            "individual_id": query.split("/")[0],
            "purpose": "draft",
            "model": {**model, "key_env": "K"},
            "response_format": "json_schema",
            "schema": self.form,
            "messages": messages,
            "prompt_sha256": "0" * 64,
            "max_tokens": 1000,
            "text": text,
            "finish": "complete",
            "tokens_in": 2000 + len(query),
            "tokens_out": 300,
            "usd": None if is_free else 0.0025,
        }
        seconds = self.draws.uniform(1, 5)
        self.append("llm_answered", query, payload, {"seconds": seconds, "tries": tries})


class Section(HTMLParser):
    """What a browser would find in the section on models."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        found = re.search(r'<section id="models">.*?</section>', page, re.S)
        self.source = found[0] if found else ""
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def facts_of(folder: Path, status: str | None = None) -> Facts:
    return gather(Chronicle.read(folder), folder, status)


def asked_of(facts: Facts) -> Exchanges:
    assert facts.asked is not None
    return facts.asked


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "260102-0304-llm"
    return AskingJournal(folder, 40, 4).write()


@pytest.fixture(scope="module")
def facts(finished: Path) -> Facts:
    return facts_of(finished)


def test_a_run_without_models_has_no_such_section(tmp_path: Path) -> None:
    facts = facts_of(LongJournal(tmp_path / "r", 12, 2).write())
    page = render(facts)
    assert facts.asked is None
    assert "Language models" not in page
    assert 'href="#models"' not in page


def test_a_run_with_models_has_one_that_the_menu_leads_to(facts: Facts) -> None:
    page = render(facts)
    assert page.count('id="models"') == 1
    assert 'href="#models"' in page
    assert "Language models" in Section(page).text


def test_every_answer_is_counted_once_under_its_model(facts: Facts) -> None:
    answers = [event.payload for event in facts.chronicle.of_kind("llm_answered")]
    models = asked_of(facts).models
    assert len(models) == 2
    assert sum(one.n_calls for one in models) == len(answers) > 40
    for one in models:
        name = one.name.partition("@")[0]
        ours = [answer for answer in answers if answer["model"]["name"] == name]
        assert one.n_calls == len(ours) == one.n_used + one.n_turned_down
        assert one.tokens_in == sum(answer["tokens_in"] for answer in ours)
        assert one.tokens_out == sum(answer["tokens_out"] for answer in ours)
        assert one.usd == pytest.approx(0.0025 * len(ours))
    assert [one.name for one in models if "@" in one.name] == ["qwen-coder@0.8"]


def test_an_answer_that_another_call_followed_was_turned_down(facts: Facts) -> None:
    keys = [event.key for event in facts.chronicle.of_kind("llm_answered")]
    followed = sum(key.endswith("/0/1") for key in keys)
    assert followed > 5, "by a second call"
    assert sum(one.n_turned_down for one in asked_of(facts).models) == followed


def test_chunks_of_one_attempt_are_used_together(tmp_path: Path) -> None:
    folder = AskingJournal(tmp_path / "r", 12, 2, form="chunk").write()
    assert sum(one.n_turned_down for one in asked_of(facts_of(folder)).models) == 0


def test_f5_f8_the_last_answer_of_an_attempt_that_failed_was_turned_down_with_its_reason(
    tmp_path: Path,
) -> None:
    class Refused(AskingJournal):
        def _one(self, generation: int, slot: int, parent: str) -> None:
            if (generation, slot) == (0, 1):
                self._refuse(parent)
            else:
                super()._one(generation, slot, parent)

        def _refuse(self, parent: str) -> None:
            name = "g00-i01"
            self.answer(f"{name}/0/0", MODELS[0], [["user", "u"]], "an answer")
            why = {"reason": "does_not_apply", "message": "search text not found"}
            who = {"individual_id": name, "parent_id": parent, "editor_id": parent}
            self.append("proposal", f"{name}/0", {**who, **why})
            self.genome[name], self.edits[name] = self.genome[parent], []
            self._individual(
                name, 0, 1, parent, "none", "INVALID", 2.5, 0.3, why["reason"], why["message"]
            )

    facts = facts_of(Refused(tmp_path / "r", 12, 2).write())
    followed = sum(e.key.endswith("/0/1") for e in facts.chronicle.of_kind("llm_answered"))
    assert sum(one.n_turned_down for one in asked_of(facts).models) == followed + 1
    failed = facts.chronicle.agent("g00-i01")
    assert failed is not None
    line = [*facts.champions_line, failed]
    told = exchanges(facts.chronicle, facts.effects, line, facts.summary)
    assert told is not None
    (ours,) = [one for one in told.of_line if one.individual_id == "g00-i01"]
    assert ours.verdict == "turned down: does not apply"


@pytest.mark.parametrize(("form", "n_open"), [("edits", 1), ("chunk", 2)])
def test_an_answer_of_an_attempt_that_goes_on_is_neither(
    tmp_path: Path, form: str, n_open: int
) -> None:
    class Asked(AskingJournal):
        def _search(self) -> None:
            super()._search()
            self.answer("g99-i00/0/0", MODELS[0], [["user", "u"]], "an answer")
            self.answer("g99-i00/0/1", MODELS[0], [["user", "v"]], "another")

    facts = facts_of(Asked(tmp_path / "r", 12, 2, form=form).write("search"))
    models = asked_of(facts).models
    under_way = sum(one.n_calls - one.n_used - one.n_turned_down for one in models)
    assert under_way == n_open


def test_effects_are_medians_over_the_rewrites_that_a_model_wrote(facts: Facts) -> None:
    writer = {
        event.payload["individual_id"]: event.payload["model"]["name"]
        for event in facts.chronicle.of_kind("llm_answered")
    }
    for one in asked_of(facts).models:
        ours = [
            agent
            for agent in facts.chronicle.rewrites
            if agent.is_ok and writer[agent.individual_id] == one.name.partition("@")[0]
        ]
        changes = [
            change
            for agent in ours
            if (change := facts.effects[agent.individual_id].perplexity_percent) is not None
        ]
        assert one.n_kept == len(ours) > 3
        assert one.n_effects == len(changes) > 3
        assert one.perplexity_percent == pytest.approx(statistics.median(changes))
        assert one.median_seconds is not None
        assert 1 < one.median_seconds < 5


def test_rates_are_told_in_words_with_their_counts(facts: Facts) -> None:
    text = Section(render(facts)).text
    uncounted = ("DUPLICATE", "INFRA_LOST")
    ended = Counter(agent.status.value for agent in facts.chronicle.rewrites)
    n = sum(count for status, count in ended.items() if status not in uncounted)
    not_ok = n - ended["OK"]
    assert not_ok > 0
    assert f"Error rate {100 * not_ok / n:.0f} %: of {n} first attempts, {not_ok} not OK." in text
    assert f"Resolution rate 0 %: 0 of {not_ok} mended in the same generation." in text


def test_f1_f3_failed_tries_are_told_by_reason(tmp_path: Path) -> None:
    class Failing(AskingJournal):
        def _search(self) -> None:
            super()._search()
            self.fail("g99-i00/0/0.0", MODELS[0], "timeout", None, unknown=True)

    facts = facts_of(Failing(tmp_path / "r", 12, 2).write("search"))
    limited = sum(
        event.payload["kind"] == "rate_limited" for event in facts.chronicle.of_kind("llm_failed")
    )
    assert limited > 1
    text = Section(render(facts)).text
    assert (
        f"Tries that failed: {limited} × rate limited (HTTP 429); 1 × timeout, and nobody" in text
    )
    assert "1 more call has no known outcome" in text


def test_an_unknown_price_is_a_dash_and_no_dollar(tmp_path: Path) -> None:
    facts = facts_of(AskingJournal(tmp_path / "r", 12, 2, priced=False).write())
    prices = {one.name: one.usd for one in asked_of(facts).models}
    assert prices["qwen-coder@0.8"] is None
    assert prices["gpt-4o-mini"] is not None
    text = Section(render(facts)).text
    assert re.search(r"qwen-coder@0\.8 http://127\.0\.0\.1:8000/v1( [\d,]+){5} – ", text)
    assert re.search(r"answers?: [\d,]+ tokens in, [\d,]+ out\.", text), "no sum of dollars"


def test_the_selected_agents_line_is_shown_with_what_was_asked_and_answered(facts: Facts) -> None:
    text = Section(render(facts)).text
    line = [agent.individual_id for agent in facts.champions_line[1:]]
    assert line
    for name in line:
        assert f"rewrite {name}" in text
        assert f"answer to {name}" in text
    others = {agent.individual_id for agent in facts.chronicle.rewrites} - set(line)
    assert not [name for name in others if f"rewrite {name}" in text]


def test_a_conversation_that_goes_on_is_not_repeated(facts: Facts) -> None:
    chronicle = facts.chronicle
    told = exchanges(chronicle, facts.effects, chronicle.agents, facts.summary)
    assert told is not None
    second = [one for one in told.of_line if one.key.endswith("/0/1")]
    assert second
    for one in second:
        assert [(text.role, text.shown) for text in one.asked] == [
            ("user", f"objection to {one.key}")
        ]
    first = [one for one in told.of_line if one.key.endswith("/0/0")]
    assert all([text.role for text in one.asked] == ["system", "user"] for one in first)


def test_f14_what_models_are_told_and_say_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    facts = facts_of(AskingJournal(tmp_path / "r", 12, 2, said=HOSTILE).write())
    section = Section(render(facts))
    assert "script" not in section.tags
    assert "img" not in section.tags
    assert "\u202e" not in section.source
    assert section.text.count("</pre></details><script>alert(1)</script>") > 1
    assert "⟨U+202E⟩{{ 7 * 7 }}" in section.text


def test_long_texts_are_cut_and_the_page_says_so(tmp_path: Path) -> None:
    folder = AskingJournal(tmp_path / "r", 12, 2, said="long " * 20_000).write()
    section = Section(render(facts_of(folder)))
    shown = re.findall(r'<pre class="wrap">(.*?)</pre>', section.source, re.S)
    assert shown
    assert max(map(len, shown)) == LONGEST
    assert "more characters; the whole text is in MLflow and in the journal." in section.text


def test_of_a_long_line_the_last_exchanges_are_shown(facts: Facts) -> None:
    told = exchanges(facts.chronicle, facts.effects, facts.chronicle.agents, facts.summary)
    assert told is not None
    n = sum(one.n_calls for one in told.models)
    assert len(told.of_line) == SHOWN
    assert told.n_left_out == n - SHOWN > 0
    last = list(facts.chronicle.of_kind("llm_answered"))[-1]
    assert told.of_line[-1].key == last.key


def test_a_thousand_individuals_leave_a_page_of_bearable_size(tmp_path: Path) -> None:
    folder = AskingJournal(tmp_path / "r", 1000, 49, said="x" * 5000).write()
    section = Section(render(facts_of(folder)))
    assert len(section.source) < (2 * SHOWN + 10) * (LONGEST + 1000)
