"""The report tells what the journal holds, whatever became of the run, and nothing else."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.champion import next_command
from darwin_exp.chronicle import Chronicle
from darwin_exp.genome import Genome
from darwin_exp.journal import Journal, JournalError
from darwin_exp.protocols import Event
from darwin_exp.report import write_report
from darwin_exp.report.__main__ import main
from darwin_exp.report.charts import best_so_far, pareto_front
from darwin_exp.report.effects import MFU, PERPLEXITY, mean_of, operator_records
from darwin_exp.report.facts import Facts, gather, n_requested
from darwin_exp.report.lineage import backbone, rows
from darwin_exp.report.page import render
from darwin_exp.report.patch import patches
from darwin_exp.report.progress import progress
from darwin_exp.unseen import spelt_out
from tests.report.long_journal import LongJournal

PICTURES = {"perplexity", "mfu", "pareto", "best_so_far", "lineage", "edits"}
HOSTILE = (
    "\x1b[31m\u202egnp.exe</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    "<svg onload=alert(3)>"
    "\"'&amp;{{ 7 * 7 }}{% for %}]]>-->$\\frac"
)


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())
        self.ids = [value for name, value in self.attributes if name == "id"]

    @classmethod
    def written(cls, folder: Path) -> Page:
        """Write a run's report and read it."""
        return cls(write_report(folder).read_text(encoding="utf-8"))

    @classmethod
    def of(cls, folder: Path, status: str | None = None) -> Page:
        """Return a run's page without writing it, nor its pictures."""
        return cls(render(gather(Chronicle.read(folder), folder, status)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "260102-0304-abcd"
    return LongJournal(folder, n_individuals=40, n_generations=4).write()


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page.written(finished)


def facts_of(folder: Path) -> Facts:
    return gather(Chronicle.read(folder), folder)


def with_claim(folder: Path, **claim: Any) -> Facts:
    """Return the facts of a run whose claim said something else."""

    def changed(event: Event) -> Event:
        if event.kind != "claim":
            return event
        return replace(
            event, payload={**event.payload, "claim": {**event.payload["claim"], **claim}}
        )

    return gather(Chronicle.of([changed(e) for e in Chronicle.read(folder).events]), folder)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_holds_every_section_and_every_agent(page: Page, finished: Path) -> None:
    chronicle = Chronicle.read(finished)
    assert len(page.ids) == len(set(page.ids))
    assert {agent.individual_id for agent in chronicle.agents} <= set(page.ids)
    assert f"hash chain verified, {len(chronicle.events):,} events" in page.text
    assert "Significant progress" in page.text
    assert chronicle.command in page.text
    for key in chronicle.config:
        assert key in page.text
    selected = chronicle.selected
    assert selected is not None
    assert f"# edited for {selected.individual_id}" in page.text, "the patch shows its code"


def test_every_link_leads_somewhere_within_the_page(page: Page) -> None:
    links = {value for name, value in page.attributes if name == "href"}
    assert links - {"data:,"} <= {f"#{name}" for name in page.ids}
    assert not [name for name, _ in page.attributes if name == "src"]
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_what_is_secret_stays_in_the_journal(page: Page) -> None:
    assert "5e" * 32 not in page.source


def test_writing_it_again_changes_nothing(finished: Path, page: Page) -> None:
    pictures = {path.name: path.read_bytes() for path in (finished / "plots").iterdir()}
    assert write_report(finished).read_text(encoding="utf-8") == page.source
    again = {path.name: path.read_bytes() for path in (finished / "plots").iterdir()}
    assert again == pictures
    assert {Path(name).stem for name in pictures} == PICTURES
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())
    assert not [path for path in finished.iterdir() if path.name.startswith(".")]


def test_what_candidates_and_models_write_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    made = LongJournal(tmp_path / "r", 20, 2, failing=0.5, hostile=HOSTILE)
    folder = made.write()
    part = {
        **dict.fromkeys(("name", "what", "file", "kind", "verdict", "note"), HOSTILE),
        **dict.fromkeys(("n", "contribution_percent", "ci95"), HOSTILE),
        "p_value": None,
        "perplexity": None,
    }
    selected = Chronicle.read(folder).selected
    assert selected is not None
    assert not selected.is_base
    found = {
        "champion_id": selected.individual_id,
        "n_seeds": 3,
        "split": HOSTILE,
        "base": None,
        "champion": {"perplexity": 9.0, "n": 3},
        "parts": [part],
        "pruned": {"dropped": [HOSTILE], "percent_vs_champion": -1.0, "ci95": None, "n": 3},
    }
    (folder / "ablation").mkdir()
    (folder / "ablation" / "summary.json").write_text(json.dumps(found))
    page = Page.written(folder)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not set("\x1b\u202e") & set(page.source)
    for place in ("summary", "message", "log", "file name", "patch", "ablation"):
        assert page.text.count("</script><script>alert(1)</script>") > 6, place
    assert "odd<b>.py" in page.text
    assert "⟨U+202E⟩" in page.text
    assert "{{ 7 * 7 }}" in page.text


# --- runs of every kind ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("through", "options", "expected"),
    [
        ("begun", {}, "nothing was measured"),
        ("search", {}, "This run is going on, or killed: no end was recorded."),
        ("end", {"failing": 1.0}, "no individual was better than the base."),
        ("end", {"mutator": "none", "failing": 0.0}, "this run is a control"),
        ("end", {"with_mfu": False}, "no MFU was measured"),
    ],
)
def test_a_run_in_any_state_has_a_report(
    tmp_path: Path, through: str, options: dict[str, Any], expected: str
) -> None:
    folder = LongJournal(tmp_path / "r", 12, 2, **options).write(through)
    page = Page.written(folder)
    assert expected.lower() in page.text.lower()
    assert "None" not in re.sub(r"<script>.*?</script>", "", page.source, flags=re.S).replace(
        "None.", ""
    )
    assert {path.stem for path in (folder / "plots").iterdir()} == PICTURES


def test_a_base_that_failed_is_shown_with_its_log(tmp_path: Path) -> None:
    page = Page.of(LongJournal(tmp_path / "r", 12, 2).write("base failed"), status="failed")
    assert "The base itself was not trained and scored: CRASHED, exception. no" in page.text
    assert "step 39 loss 0.2250" in page.text


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    folder = LongJournal(tmp_path / "r", 12, 2).write("search")
    page = Page.of(folder, status="interrupted")
    assert "This run is interrupted." in page.text
    assert "python -m darwin_exp resume=r" in page.text


def test_a_run_without_test_split_has_no_claim_and_says_why(tmp_path: Path) -> None:
    made = LongJournal(tmp_path / "r", 12, 2)
    folder = made.write("search")
    journal = Journal(folder)
    best = min(made.best, key=lambda name: made.loss[name])
    claim = {"baseline_id": "g00-i00", "selected_id": best, "claim": None, "earlier_claims": 0}
    why = "the data set has no test split"
    journal.append("claim", "after-g02", {**claim, "why_none": why})
    journal.close()
    assert "No claim The data set has no test split." in Page.of(folder).text


def test_further_generations_of_a_resumed_run_are_requested_too(tmp_path: Path) -> None:
    made = LongJournal(tmp_path / "r", 12, 2)
    folder = made.write("search")
    before = n_requested(Chronicle.read(folder))
    journal = Journal(folder)
    command = "python -m darwin_exp resume=latest n_generations=7"
    journal.append("session", "1", {"what": "resumed"}, {"command": command})
    journal.close()
    assert n_requested(Chronicle.read(folder)) == before + 5 * made.size
    assert command in Page.of(folder).text


def champion_of(folder: Path) -> str:
    selected = Chronicle.read(folder).selected
    assert selected is not None
    return selected.individual_id


def test_what_can_be_done_with_a_champion_is_offered_once_there_is_one(
    page: Page, finished: Path, tmp_path: Path
) -> None:
    commands = ("genome.dir=", "python -m darwin_exp.ablate")
    for command in commands:
        assert command in page.text
    assert next_command(Chronicle.read(finished), finished / "champion") in page.text
    going_on = Page.of(LongJournal(tmp_path / "on", 12, 2).write("search"))
    base = Page.of(LongJournal(tmp_path / "base", 12, 2, failing=1.0).write())
    for command in commands:
        assert command not in going_on.text
        assert command not in base.text


def test_a_claim_that_does_not_know_the_last_generations_is_said_to_be_old(
    page: Page, finished: Path
) -> None:
    assert "older than the run" not in page.text
    events = Chronicle.read(finished).events
    last = [event for event in events if event.kind == "individual"][-1]
    later = [
        replace(last, key=name, payload={**last.payload, "individual_id": name, "generation": 5})
        for name in ("g05-i00", "g05-i01")
    ]
    facts = gather(Chronicle.of([*events, *later]), finished, "interrupted")
    text = Page(render(facts)).text
    assert "older than the run" in text
    assert "does not know the 2 rewrites finished since" in text
    again = next(event for event in events if event.kind == "claim")
    closed = gather(Chronicle.of([*events, *later, replace(again, key="after-g05")]), finished)
    assert closed.n_unclaimed == 0


def test_an_ablation_is_told_in_changes_and_by_its_source(tmp_path: Path) -> None:
    folder = LongJournal(tmp_path / "r", 20, 2).write()
    part = {"name": "rotary", "contribution_percent": 3.0, "ci95": [1.0, 5.0], "verdict": "pays"}
    found = {
        "champion_id": champion_of(folder),
        "n_seeds": 4,
        "split": "gate",
        "base": {"perplexity": None, "n": 0, "note": "1 of 1 trainings failed: CRASHED"},
        "champion": {"perplexity": 9.0, "n": 4, "note": ""},
        "parts": [part],
        "pruned": {"dropped": ["wider"], "percent_vs_champion": 1.5, "ci95": [0.5, 2.5], "n": 4},
    }
    (folder / "ablation").mkdir()
    (folder / "ablation" / "summary.json").write_text(json.dumps(found))
    page = Page.of(folder)
    assert "−3.0 % −5.0 % to −1.0 %" in page.text
    assert "Without wider: perplexity −1.5 % against the champion ( −2.5 % to −0.5 %" in (
        page.text.replace("(−", "( −")
    )
    assert "base – (1 of 1 trainings failed: CRASHED), champion 9.000." in page.text
    assert "from ablation/summary.json , which the ablation left" in page.text
    assert "Of perplexity only" not in page.text
    assert "Of perplexity only" in Page(render(by_mfu(folder))).text


# --- what is claimed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "verdict", "figure", "tone"),
    [
        ({"perplexity_percent": 12.34}, "Significant progress", "−12.3 %", "good"),
        ({"significant": False}, "No significant progress", "−5.0 %", "plain"),
        ({"perplexity_percent": -5.0}, "No progress: significantly worse", "+5.0 %", "bad"),
        ({"perplexity_percent": None, "ci95": None, "p_value": None}, "No claim", "", "plain"),
    ],
)
def test_the_headline_says_what_the_claim_says(
    finished: Path, claim: dict[str, Any], verdict: str, figure: str, tone: str
) -> None:
    first = with_claim(finished, **{"perplexity_percent": 5.0, **claim}).statements[0]
    assert (first.verdict, first.figure, first.tone) == (verdict, figure, tone)
    if figure:
        assert "−45.0 % to −20.0 %" in first.detail
        assert "4 + 4 fresh trainings" in first.detail
    assert ("Chance alone" in first.detail) is (verdict == "No significant progress")


def test_the_claim_at_equal_steps_stands_beside_the_other(finished: Path) -> None:
    about = [(one.about, one.figure) for one in facts_of(finished).statements]
    assert about[1] == ("Test perplexity at equal steps", "−21.0 %")
    assert "150 steps each" in facts_of(finished).statements[1].detail


def test_under_a_number_of_steps_there_is_one_claim(finished: Path) -> None:
    def by_steps(event: Event) -> Event:
        if event.kind != "run":
            return event
        config = {**event.payload["config"], "max_steps": 99}
        return replace(event, payload={**event.payload, "config": config})

    events = [by_steps(event) for event in Chronicle.read(finished).events]
    found = gather(Chronicle.of(events), finished).statements
    assert [one.about for one in found] == [
        "Test perplexity at equal steps",
        "Model FLOPs utilisation",
    ]
    assert "99 steps each" in found[0].detail


# --- effects --------------------------------------------------------------------------------------


def test_means_are_students_where_weights_are_equal() -> None:
    changes = [-0.1, -0.05, 0.02, -0.07]
    mean = mean_of([(1.0, change) for change in changes])
    assert mean is not None
    assert mean.low is not None
    assert mean.high is not None
    centre = sum(changes) / 4
    sd = math.sqrt(sum((change - centre) ** 2 for change in changes) / 3)
    margin = 3.182446305284263 * sd / 2  # t(3, 0.975)
    assert mean.percent == pytest.approx(100 * math.expm1(centre))
    assert mean.low == pytest.approx(100 * math.expm1(centre - margin))
    assert mean.high == pytest.approx(100 * math.expm1(centre + margin))


@given(
    st.lists(
        st.tuples(st.sampled_from([1.0, 0.5, 1 / 3]), st.floats(-2, 2)), min_size=1, max_size=9
    ),
    st.floats(0.1, 10),
)
def test_an_interval_holds_its_mean_and_the_unit_of_weights_does_not_matter(
    outcomes: list[tuple[float, float]], unit: float
) -> None:
    mean = mean_of(outcomes)
    scaled = mean_of([(unit * weight, change) for weight, change in outcomes])
    assert mean is not None
    assert scaled is not None
    assert scaled.percent == pytest.approx(mean.percent, abs=1e-6)
    assert mean.n == len(outcomes)
    if len(outcomes) == 1:
        assert mean.low is mean.high is None
    if mean.low is not None and mean.high is not None:
        assert mean.low <= mean.percent + 1e-9
        assert mean.percent <= mean.high + 1e-9


def test_two_new_edits_share_an_outcome_and_failures_are_counted(finished: Path) -> None:
    chronicle = Chronicle.read(finished)
    records = {record.name: record for record in operator_records(chronicle)}
    tried = [(agent, edit) for agent in chronicle.rewrites for edit in agent.new_edits]
    for name, record in records.items():
        ours = [agent for agent, edit in tried if edit.operator == name]
        assert record.n_tried == len(ours)
        assert record.n_ok == sum(agent.is_ok for agent in ours)
        assert sum(record.failures.values()) == record.n_tried - record.n_ok
        weights = total = 0.0
        for agent in ours:
            parent = chronicle.agent(agent.parent_ids[0])
            assert parent is not None
            if agent.is_ok:
                weight = 1 / len(agent.new_edits)
                change = math.log(agent.values[PERPLEXITY] / parent.values[PERPLEXITY])
                weights, total = weights + weight, total + weight * change
        if record.perplexity is not None:
            assert record.perplexity.percent == pytest.approx(100 * math.expm1(total / weights))


def test_a_retimed_rate_is_not_taken_for_an_effect(finished: Path) -> None:
    facts = facts_of(finished)
    chronicle = facts.chronicle
    selected = chronicle.selected
    assert selected is not None
    searched = {
        event.payload["individual_id"]: event.measured["rates"].get(MFU)
        for event in chronicle.of_kind("individual")
    }
    assert selected.values[MFU] != searched[selected.individual_id], "it was timed again"
    parent = searched[selected.parent_ids[0]]
    expected = 100 * (searched[selected.individual_id] / parent - 1)
    assert facts.effects[selected.individual_id].mfu_percent == pytest.approx(expected)


def by_mfu(folder: Path) -> Facts:
    """Return the facts of a run as if it had been selected by MFU, at the base's perplexity."""
    chronicle = Chronicle.read(folder)
    assert chronicle.base is not None
    base = chronicle.base.values[PERPLEXITY]

    def weighed(event: Event) -> Event:
        payload = {**event.payload}
        if event.kind == "run":
            payload["config"] = {**payload["config"], "fitness.name": "mfu"}
        elif event.kind == "individual" and payload["status"] == "OK":
            excess = math.log(payload["metrics"][PERPLEXITY] / base)
            payload["fitness"] = event.measured["rates"][MFU] if excess <= 0 else -excess
        return replace(event, payload=payload)

    return gather(Chronicle.of([weighed(event) for event in chronicle.events]), folder)


def test_a_perplexity_above_the_margin_is_not_shown_as_an_mfu(finished: Path) -> None:
    facts = by_mfu(finished)
    measured = [one for one in facts.chronicle.rewrites if one.fitness is not None]
    above = {one.individual_id for one in measured if (one.fitness or 0.0) < 0}
    assert 0 < len(above) < len(measured)
    shown = progress(facts)
    assert shown.n_left_out == len(above)
    assert {one.individual_id for _, one, _ in shown.each} == {
        one.individual_id for one in measured if one.individual_id not in above
    }
    assert all(value > 0 for _, value in shown.curve)
    assert all(value > 0 for _, _, value in shown.each)
    assert f"{len(above)} with perplexity above the margin left out" in best_so_far(facts)


def test_a_perplexity_above_the_margin_has_no_z_in_the_noise_of_mfu(finished: Path) -> None:
    facts = by_mfu(finished)
    known = set()
    for agent in facts.chronicle.rewrites:
        parent = facts.chronicle.agent(agent.parent_ids[0])
        assert parent is not None
        if agent.fitness is not None and parent.fitness is not None:
            within = agent.fitness >= 0 and parent.fitness >= 0
            known.add(within)
            assert (facts.effects[agent.individual_id].z is not None) is within
    assert known == {True, False}


# --- time, lineage, front, patch ------------------------------------------------------------------


def test_the_phases_add_up_to_the_whole_run(finished: Path) -> None:
    facts = facts_of(finished)
    seconds = facts.summary["seconds"]
    assert [phase.name for phase in facts.phases] == [
        *(f"generation {k}" for k in range(5)),
        "closing",
    ]
    assert sum(p.wall_seconds for p in facts.phases) == pytest.approx(seconds["total"], abs=1e-4)
    for stage in ("startup", "training", "scoring", "overhead"):
        total = sum(phase.slot_seconds[stage] for phase in facts.phases)
        assert total == pytest.approx(seconds[stage])
    assert all(value >= 0 for phase in facts.phases for value in phase.slot_seconds.values())


def test_the_tree_holds_everybody_once_below_their_parent(finished: Path) -> None:
    facts = facts_of(finished)
    placed = rows(facts)
    assert sorted(p.agent.individual_id for p in placed) == sorted(
        agent.individual_id for agent in facts.chronicle.agents
    )
    for place in placed[1:]:
        assert place.parent_row is not None
        assert placed[place.parent_row].agent.individual_id == place.agent.parent_ids[0]
        assert place.parent_row < place.row
    some = rows(facts, backbone(facts))
    assert sum(place.n_hidden for place in some) + len(some) == len(placed)
    assert {agent.individual_id for agent in facts.champions_line} <= {
        place.agent.individual_id for place in some
    }


def test_nobody_beats_a_member_of_the_front_and_somebody_beats_all_others(finished: Path) -> None:
    ok = [agent for agent in Chronicle.read(finished).agents if agent.is_ok]
    front = pareto_front(ok)

    def beats(one: Any, other: Any) -> bool:
        better = one.values[PERPLEXITY] <= other.values[PERPLEXITY]
        return better and one.values[MFU] >= other.values[MFU] and one is not other

    for agent in ok:
        assert any(beats(other, agent) for other in ok) is (agent not in front)


LINES = st.lists(st.text(max_size=12), max_size=12).map("\n".join)


@given(LINES, LINES, st.sampled_from(["a.py", "a.json", "a.txt", "a.yaml"]))
@settings(max_examples=60, deadline=None)
def test_a_patch_shows_the_code_as_it_is(old: str, new: str, path: str) -> None:
    before, after = Genome.of({path: old}), Genome.of({path: new})
    texts = [spelt_out(one.as_dict[path]).split("\n") for one in (before, after)]
    for file in patches(before, after):
        for line in file.lines:
            shown = html.unescape(re.sub(r"<[^>]*>", "", line.code))
            if line.after is not None:
                assert shown == texts[1][line.after - 1]
            elif line.before is not None:
                assert shown == texts[0][line.before - 1]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_writes_the_report_and_says_where(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "report.html").unlink(missing_ok=True)
    assert main([finished.name, "--runs", str(finished.parent)]) == 0
    assert Path(capsys.readouterr().out.strip()) == (finished / "report.html").resolve()
    assert (finished / "report.html").is_file()


def test_the_command_answers_what_it_cannot_do_in_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged, unbegun = tmp_path / "damaged", tmp_path / "unbegun"
    damaged.mkdir()
    shutil.copy(finished / "journal.sqlite", damaged)
    content = bytearray((damaged / "journal.sqlite").read_bytes())
    at = content.index(b"so that it learns more")
    content[at : at + 2] = b"SO"
    (damaged / "journal.sqlite").write_bytes(content)
    unbegun.mkdir()
    Journal(unbegun).close()
    for name, words in (
        ("nowhere", "no such run"),
        ("damaged", "is damaged"),
        ("unbegun", "had not begun"),
    ):
        assert main([name, "--runs", str(tmp_path)]) == 2
        said = capsys.readouterr()
        assert words in said.err
        assert said.err.count("\n") == 1
        assert not said.out


def test_a_missing_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
