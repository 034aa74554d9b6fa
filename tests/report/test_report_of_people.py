"""The report, the summary and the champion's folder tell people's part, within one environment."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.champion import leave_champion
from darwin_exp.chronicle import Agent, Chronicle
from darwin_exp.compare.comparison import compare
from darwin_exp.genome import Genome
from darwin_exp.individual import DataSpec, Status, TrainingSpec
from darwin_exp.involvement import involvement
from darwin_exp.report.charts import base_values
from darwin_exp.report.effects import PERPLEXITY, at_birth
from darwin_exp.report.facts import gather
from darwin_exp.report.page import render
from darwin_exp.report.people import People, people
from darwin_exp.report.pictures import draw
from darwin_exp.report.progress import progress
from tests.report.long_journal import LongJournal
from tests.report.peopled_journal import GAIN, OPENED_IN, TEXT_HASH, PeopledJournal

HOSTILE = (
    "\x1b[31m\u202e</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;{{ 7*7 }}"
)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> PeopledJournal:
    folder = tmp_path_factory.mktemp("runs") / "260102-0304-abcd"
    made = PeopledJournal(folder, n_individuals=40, n_generations=4)
    made.write()
    return made


@pytest.fixture(scope="module")
def chronicle(journal: PeopledJournal) -> Chronicle:
    return Chronicle.read(journal.folder)


@pytest.fixture(scope="module")
def page(chronicle: Chronicle, journal: PeopledJournal) -> str:
    return render(gather(chronicle, journal.folder))


def told(page: str, section: str) -> str:
    """Return the words of a section, as a reader sees them."""
    found = re.search(rf'<section id="{section}">(.*?)</section>', page, flags=re.S)
    assert found is not None, section
    return " ".join(re.sub(r"<[^>]*>", " ", found[1]).split())


def people_of(chronicle: Chronicle, slot_seconds: float | None = None) -> People:
    found = people(chronicle, slot_seconds)
    assert found is not None
    return found


def agent(chronicle: Chronicle, name: str) -> Agent:
    found = chronicle.agent(name)
    assert found is not None
    return found


# --- environments --------------------------------------------------------------------------------


def test_who_was_measured_again_shows_what_came_of_it(
    chronicle: Chronicle, journal: PeopledJournal
) -> None:
    base = agent(chronicle, "g00-i00")
    assert (base.environment, base.made_in) == (1, 0)
    assert base.fitness == pytest.approx(GAIN - 2.5)
    assert base.measurements[0].fitness == pytest.approx(-2.5)
    assert base.seen_in(0).fitness == pytest.approx(-2.5)
    assert base.seen_in(7).fitness is None, "never measured there"
    again = {event.payload["individual_id"] for event in chronicle.of_kind("remeasured")}
    assert len(again) > 2
    for one in chronicle.agents:
        assert one.environment == (one.individual_id in again or one.generation >= OPENED_IN)
    assert [e.index for e in chronicle.environments] == [0, 1]
    opened = chronicle.environments[1]
    assert opened.generation == OPENED_IN
    assert opened.because == (journal.asked["books"].request_id,)
    assert chronicle.current is chronicle.claimed_in is opened


def test_one_that_fails_when_measured_again_was_ok_and_lives_no_longer(
    chronicle: Chronicle, journal: PeopledJournal
) -> None:
    lost = agent(chronicle, journal.fallen)
    assert lost.is_ok
    assert lost.fitness is None
    assert lost.fell_in is not None
    assert lost.fell_in.status is Status.CRASHED
    assert sum(one.fell_in is not None for one in chronicle.agents) == 1
    summary = gather(chronicle, journal.folder).summary
    counts = summary["ok"] + sum(summary["failed"].values()) + summary["lost"]
    assert summary["requested"] == counts + summary["duplicates"] + summary["not_started"]
    assert summary["ok"] == sum(one.is_ok for one in chronicle.rewrites), "as it was made"
    assert summary["error_rate"] == pytest.approx(
        sum(not one.is_ok for one in chronicle.rewrites if one.status.value not in UNCOUNTED)
        / sum(one.status.value not in UNCOUNTED for one in chronicle.rewrites)
    ), "a training of another environment is nobody's first attempt"


UNCOUNTED = ("DUPLICATE", "INFRA_LOST")


def test_a_later_retiming_still_wins_and_an_earlier_one_does_not(chronicle: Chronicle) -> None:
    base = agent(chronicle, "g00-i00")
    last = [e for e in chronicle.of_kind("retimed") if e.payload["individual_id"] == "g00-i00"][-1]
    assert base.value("mfu") == last.measured["mfu"]
    assert base.measurements[0].values["mfu"] != last.measured["mfu"], "of another environment"
    early = replace(last, measured={**last.measured, "mfu": 0.99})
    k = next(k for k, event in enumerate(chronicle.events) if event.kind == "environment")
    events = [e for e in chronicle.events if e.kind != "retimed"]
    before = Chronicle.of([*events[:k], early, *events[k:]])
    base = agent(before, "g00-i00")
    assert base.measurements[0].values["mfu"] == 0.99
    assert base.value("mfu") == pytest.approx(0.3), "it was timed before it was measured again"


def test_the_fittest_so_far_is_one_of_the_last_environment(chronicle: Chronicle) -> None:
    """Control: measured in an easier environment, anybody would win."""
    unclosed = Chronicle.of(
        [event for event in chronicle.events if event.kind not in ("claim", "equal_steps")]
    )
    harder = Chronicle.of(
        [
            replace(event, payload={**event.payload, "fitness": 9.0})
            if event.kind == "individual" and event.key == "g00-i01"
            else event
            for event in unclosed.events
        ]
    )
    best = max(one.fitness for one in harder.agents if one.fitness is not None)
    assert best == 9.0
    selected = harder.selected
    assert selected is not None
    assert selected.environment == 1
    assert selected.individual_id != "g00-i01"


def test_the_best_so_far_begins_anew_with_each_environment(
    chronicle: Chronicle, journal: PeopledJournal
) -> None:
    first, second = chronicle.best_by_environment()
    n_before = sum(one.generation < OPENED_IN for one in chronicle.rewrites)
    assert (first[0], second[0]) == (0, n_before)
    assert len(first[1]) == n_before + 1
    assert len(chronicle.best_so_far()) == len(chronicle.rewrites) + 1
    assert second[1][0] is not None
    assert first[1][-1] is not None
    assert second[1][0] > first[1][-1] + GAIN / 2, "those measured again, not those before"
    found = progress(gather(chronicle, journal.folder))
    assert found.opened_at == (n_before,)
    assert [len(curve) for curve in found.curves] == [len(one) for _, one in (first, second)]
    told = compare([_with_seed(chronicle)], "x").runs[0]
    assert told.curve[:n_before] == (None,) * n_before
    assert told.values["best_val_perplexity"] == pytest.approx(math.exp(-(second[1][-1] or 0)))


def _with_seed(chronicle: Chronicle) -> Chronicle:
    begun, *events = chronicle.events[1:]
    config = {**begun.payload["config"], "seed": 0}
    return Chronicle.of([replace(begun, payload={**begun.payload, "config": config}), *events])


def test_runs_are_compared_within_the_environment_of_their_claim(
    chronicle: Chronicle, tmp_path: Path
) -> None:
    plain = Chronicle.read(LongJournal(tmp_path / "plain", 12, 2).write())
    found = compare([_with_seed(chronicle), _with_seed(plain)], "two")
    assert [cohort.environment_id for cohort in found.cohorts] == ["11" * 6, "abcdef123456"]
    assert "what people granted on the way" in found.notes[0]


def test_effects_are_measured_where_both_were(chronicle: Chronicle) -> None:
    """A parent that was measured again is compared with its earlier child as it was before."""
    mixed = []
    for child in chronicle.rewrites:
        pair, parent = at_birth(chronicle, child), chronicle.agent(child.parent_ids[0])
        if child.is_ok and pair is not None and parent is not None:
            found = [one.values.get(PERPLEXITY) for one in pair]
            assert None not in found
            mixed.append(abs(math.log(found[0] / found[1])))  # type: ignore[operator]
    assert len(mixed) > 20
    assert max(mixed) < GAIN, "the gain of the environment is nobody's edit"


def test_only_the_base_of_an_environment_measures_its_noise(
    chronicle: Chronicle, journal: PeopledJournal
) -> None:
    facts = gather(chronicle, journal.folder)
    before, after = (base_values(facts, PERPLEXITY, k) for k in (0, 1))
    assert (len(before), len(after)) == (4, 3)
    assert max(after) < min(before)
    assert [event.payload["environment"] for event in chronicle.base_repeats] == [1, 1, 1]


# --- the summary ---------------------------------------------------------------------------------


def test_the_summary_compares_within_the_environment_of_the_closing(
    chronicle: Chronicle, journal: PeopledJournal
) -> None:
    summary = gather(chronicle, journal.folder).summary
    assert summary["environments"] == 2
    assert summary["environment"] == {
        "index": 1,
        "id": "11" * 6,
        "why": [journal.asked["books"].request_id],
    }
    log_loss = math.log(summary["baseline"]["val_perplexity"])
    assert log_loss == pytest.approx(2.5 - GAIN, abs=0.03), "no run of environment 0 in it"
    assert summary["baseline"]["mfu"] == agent(chronicle, "g00-i00").value("mfu")
    assert summary["people"] == {
        "asked": 9,
        "granted": 5,
        "denied": 2,
        "expired": 1,
        "waiting": 1,
        "reviews": 4,
        "review_waited_seconds": 204.0,
        "review_idle_seconds": 64.0,
        "effects": {"done": 2, "failed": 1},
        "withdrawn": 0,
    }


def test_a_claim_stays_in_its_environment_when_another_is_opened_after_it(
    chronicle: Chronicle, tmp_path: Path
) -> None:
    before = gather(chronicle, tmp_path).summary
    opened = next(chronicle.of_kind("environment"))
    later = replace(opened, key="2", payload={**opened.payload, "index": 2})
    gone_on = Chronicle.of([*chronicle.events, later])
    after = gather(gone_on, tmp_path).summary
    assert (gone_on.current.index, gone_on.claimed_in.index) == (2, 1)
    assert after["environments"] == 3
    for key in ("environment", "baseline", "champion", "improvement"):
        assert after[key] == before[key]


def test_a_run_without_people_has_the_new_keys_and_nothing_else_new(tmp_path: Path) -> None:
    folder = LongJournal(tmp_path / "r", 12, 2).write()
    facts = gather(Chronicle.read(folder), folder)
    assert facts.people is None
    numbers = facts.summary["people"]
    assert numbers.pop("effects") == {"done": 0, "failed": 0}
    assert set(numbers.values()) == {0}
    assert facts.summary["environments"] == 1
    shown = render(facts).replace((Path(__file__).parents[2] / STYLE).read_text(), "")
    for word in ("environment 1", 'id="people"', "opened", 'class="mark"', 'class="old"'):
        assert word not in shown


STYLE = "darwin_exp/report/page.css"


def test_a_review_that_the_inbox_was_not_asked_about_again_counts_as_it_ended(
    chronicle: Chronicle,
) -> None:
    """The champion's answer comes after the last entries that the run takes."""
    last = max(k for k, event in enumerate(chronicle.events) if event.kind == "inbox")
    cut = [event for k, event in enumerate(chronicle.events) if k != last]
    all_of_it, found = involvement(chronicle.events).in_numbers, involvement(cut).in_numbers
    assert (found["asked"], found["waiting"]) == (all_of_it["asked"], all_of_it["waiting"])


# --- the page ------------------------------------------------------------------------------------


def test_the_page_tells_what_was_asked_decided_and_came_of_it(
    page: str, journal: PeopledJournal
) -> None:
    words = told(page, "people")
    assert "9 requests, 4 of them for a review: 5 granted, 2 denied, 1 expired" in words
    assert "Reviews waited 3 min 24 s in all and left slots idle for 1 min 04 s" in words
    assert "The run was paused for 1 min 15 s in all." in words
    assert "approved, changed by mira (web)" in words
    assert "denied by otto (terminal)" in words
    assert "done , generation 2: extra training text of 1,234,567 tokens" in words
    assert "failed , generation 2: a library goes into a new image" in words
    assert "Approved in its place:" in words
    assert "1 entry that does not count" in words
    assert "only a person may say so" in words
    assert "and more lines" not in words, "of a reason the first line"
    for name in ("books", "einops", "why"):
        assert f'id="request-{journal.asked[name].request_id}"' in page
    for said in ("Try the schedule first.", "too clever", "max_hours = 8", "at noon"):
        assert said in words


def test_the_page_tells_the_environments_with_the_base_before_and_after(
    page: str, chronicle: Chronicle, journal: PeopledJournal
) -> None:
    words = told(page, "people")
    assert "environment 1: data since generation 2" in words
    assert "from textdir /books/sea, licence CC0-1.0, hash ab12cd34ef56" in words
    before, after = people_of(chronicle).environments
    assert before.base is not None
    assert after.base is not None
    assert after.base == pytest.approx(before.base * math.exp(-GAIN), rel=0.02)
    assert f"{journal.fallen} lives no longer (CRASHED: no such file)" in words
    assert page.count("environment 1: data</text>") == 3, "a line in each chart over time"
    assert "Both in environment 1: data;" in told(page, "result")


def test_every_link_of_the_section_leads_somewhere(page: str) -> None:
    ids = set(re.findall(r' id="([^"]*)"', page))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= ids


def test_agents_are_marked_with_what_people_had_to_do_with_them(
    chronicle: Chronicle, journal: PeopledJournal, page: str
) -> None:
    marks = people_of(chronicle).marks
    assert marks["g01-i01"] == ["approved by mira", "vetoed by mira"]
    assert marks["g01-i02"] == ["denied by mira"]
    assert marks["g01-i03"] == ["expired"]
    assert marks["g02-i00"] == [f"commissioned by {journal.asked['tools'].request_id}"]
    selected = chronicle.selected
    assert selected is not None
    assert "before the claim approved by mira" in marks[selected.individual_id]
    assert "CRASHED when measured again" in told(page, "individuals")


def test_idle_time_is_told_as_a_share_of_slot_time_where_that_is_known(
    chronicle: Chronicle,
) -> None:
    assert people_of(chronicle, 1066.0).idle.endswith("idle for 1 min 04 s (6 % of slot time).")
    assert people_of(chronicle, 1e6).idle.endswith("(under 1 % of slot time).")
    assert people_of(chronicle).idle.endswith("idle for 1 min 04 s.")


def test_g5_what_agents_and_people_write_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    made = PeopledJournal(
        tmp_path / "r", n_individuals=24, n_generations=3, words=HOSTILE, is_revoked=True
    )
    page = render(gather(Chronicle.read(made.write()), tmp_path))
    assert page.count("<script>") == 1
    assert "<img" not in page
    assert not set("\x1b\u202e") & set(page)
    assert "{{ 7*7 }}" in page
    assert page.count("&lt;script&gt;alert(1)") > 12


def test_a_revoked_text_is_told_and_opens_an_environment_without_it(tmp_path: Path) -> None:
    made = PeopledJournal(tmp_path / "r", n_individuals=24, n_generations=3, is_revoked=True)
    chronicle = Chronicle.read(made.write())
    words = told(render(gather(chronicle, tmp_path)), "people")
    assert "revoked by otto (terminal)" in words
    assert "taken back , generation 3: revoked: it is in force no longer" in words
    assert "nothing: the run's own again" in words.replace("&#39;", "'")
    assert [len(one.changed) for one in people_of(chronicle).environments] == [0, 1, 0]
    assert involvement(chronicle.events).in_numbers["granted"] == 5, "it was granted"


def test_pictures_show_the_last_environment_alone(
    chronicle: Chronicle, journal: PeopledJournal, tmp_path: Path
) -> None:
    files = draw(gather(chronicle, journal.folder), tmp_path)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)


# --- the champion's folder -----------------------------------------------------------------------


def test_the_champion_trains_with_the_text_that_it_was_measured_with(
    chronicle: Chronicle, journal: PeopledJournal, tmp_path: Path
) -> None:
    own = DataSpec(tmp_path / "data", "hash", 84)
    training = TrainingSpec(budget_seconds=12.0, max_steps=None, seed=0, context_length=64)
    summary = gather(chronicle, journal.folder).summary
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    leave_champion(run_folder, chronicle, summary, own, training)
    folder = run_folder / "champion"
    assert Genome.from_folder(folder).id == agent(chronicle, _champion(summary)).genome_id
    job = json.loads((folder / "job.json").read_text())
    assert job["extra_train"] == ["/data/prepared/extra-ab12/train.bin"]
    readme = (folder / "README.md").read_text()
    assert "textdir /books/sea, licence CC0-1.0, hash " + TEXT_HASH[:12] in readme
    assert "environment 1" in readme


def _champion(summary: Any) -> str:
    return str(summary["champion"]["individual_id"])


def test_what_was_granted_of_budgets_is_in_the_champions_job(
    chronicle: Chronicle, tmp_path: Path
) -> None:
    changed = {"budget_seconds": 20.0, "memory_mb": 8192, "libraries": ["einops"]}
    events = [
        replace(event, payload={**event.payload, "changed": changed})
        if event.kind == "environment"
        else event
        for event in chronicle.events
    ]
    longer = Chronicle.of(events)
    training = TrainingSpec(budget_seconds=12.0, max_steps=None, seed=0, context_length=64)
    data = DataSpec(tmp_path / "data", "hash", 84)
    leave_champion(tmp_path, longer, gather(longer, tmp_path).summary, data, training)
    job = json.loads((tmp_path / "champion" / "job.json").read_text())
    assert (job["budget_seconds"], job["extra_train"]) == (20.0, [])
    readme = (tmp_path / "champion" / "README.md").read_text()
    assert "budget seconds: 20.0 s" in readme
    assert "may be imported: einops" in readme
