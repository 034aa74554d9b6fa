"""Relevance: which lessons come first, and what is told once instead of many times."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from darwin_exp.individual import Edit, Status
from darwin_exp.mutation.relevance import Tried, most_relevant
from darwin_exp.protocols import EditRequest, Lesson
from tests.mutation.at_hand import BASE, LESSONS, PARENT, lesson, request


def order(*lessons: Lesson, asked: EditRequest | None = None, files: tuple[str, ...] = ()) -> str:
    """Return the names of lessons as they are ranked, most relevant first."""
    asked = replace(asked or request(), lessons=lessons)
    return " ".join(tried.lesson.individual_id for tried in most_relevant(asked, files))


def only(*lessons: Lesson) -> Tried:
    (tried,) = most_relevant(request(lessons=lessons))
    return tried


def test_what_touches_a_file_at_hand_comes_first() -> None:
    one = lesson("a", "xxx", "model.py")
    other = lesson("b", "yyy", "settings.json")  # which the parent changed of the base
    assert order(one, other) == "b a"
    assert order(one, other, files=("model.py",)) == "a b"
    assert order(other, one, asked=request(parent=BASE)) == "a b"  # all at hand: by name


def test_words_of_what_the_parent_changed_count_more_than_words_of_its_code() -> None:
    changed = lesson("a", "learning rate")  # stands in the line that the parent changed
    code = lesson("b", "warm progress")
    neither = lesson("c", "quantum foam")
    assert order(neither, code, changed) == "a b c"


def test_a_large_effect_in_either_direction_counts() -> None:
    small = lesson("a", "xxx", z_score=0.3)
    good = lesson("b", "yyy", z_score=2.0)
    bad = lesson("c", "zzz", z_score=-3.0)
    assert order(small, good, bad) == "c b a"


def test_one_wild_effect_counts_no_more_than_a_clear_one() -> None:
    clear, wild = (only(lesson("a", "xxx", z_score=z)).relevance for z in (4.0, 1e9))
    assert clear == wild


def test_a_failure_is_worth_knowing() -> None:
    failed = lesson("a", "xxx", status=Status.CRASHED, error="exception: no")
    assert order(lesson("b", "yyy", z_score=1.0), failed, lesson("c", "zzz", z_score=2.5)) == (
        "c a b"
    )


def test_what_the_line_of_editor_and_parent_had_a_part_in_counts() -> None:
    stranger = lesson("x1", "xxx", parent_id="y0", editor_id="y0")
    edited = lesson("x2", "yyy", parent_id="x0", editor_id="g01-i03")
    assert order(stranger, edited) == "x2 x1"
    # The parent's own parent, as a lesson tells.
    born = lesson("g01-i02", "zzz", parent_id="far", editor_id="far", z_score=0.1)
    ancestor = lesson("far", "www", parent_id="x0", editor_id="x0")
    assert order(stranger, ancestor, born).split()[-1] == "x1"


def test_of_two_that_are_equal_the_more_recent_comes_first() -> None:
    old, new = lesson("a", "xxx", generation=1), lesson("b", "yyy", generation=2)
    assert order(old, new) == order(new, old) == "b a"


def test_the_order_does_not_depend_on_the_order_of_arrival() -> None:
    shuffled = list(LESSONS)
    Random(3).shuffle(shuffled)
    assert order(*shuffled) == order(*LESSONS)


def test_the_same_summary_is_one_attempt_with_its_mean() -> None:
    tried = only(
        lesson("a", "Rotary  positions", effect=0.1, z_score=1.0),
        lesson("b", "rotary positions", generation=2, effect=0.3, z_score=3.0),
        lesson("c", "rotary positions", status=Status.CRASHED, error="exception: no"),
    )
    assert (tried.n, tried.n_failed) == (3, 1)
    assert tried.lesson.individual_id == "b"
    assert tried.effect == 0.2
    assert tried.z_score == 2.0
    assert tried.failure is not None
    assert tried.failure.individual_id == "c"


def test_built_in_edits_are_the_same_whatever_their_numbers() -> None:
    def drawn(name: str, factor: float) -> Lesson:
        edit = Edit("higher_rate", "settings.json", "why", {"factor": factor})
        return replace(lesson(name, f"peak rate x{factor}"), edits=(edit,))

    assert only(drawn("a", 1.5), drawn("b", 2.0)).n == 2
    one, other = lesson("a", "rate x1.5"), lesson("b", "rate x2.0")
    assert len(most_relevant(request(lessons=(one, other)))) == 2


def test_what_says_nothing_about_an_edit_is_no_experience() -> None:
    lost = lesson("a", "xxx", status=Status.INFRA_LOST)
    known = lesson("b", "yyy", status=Status.DUPLICATE)
    assert order(lost, known) == ""


def test_an_answer_that_nobody_could_read_is_no_experience() -> None:
    unread = replace(
        lesson("a", "the edit was refused", status=Status.INVALID, error="malformed: x"), edits=()
    )
    tried = lesson("b", "a wider head", status=Status.INVALID, error="smoke: it crashed")
    (told,) = most_relevant(request(lessons=(unread, tried)))
    assert told.lesson.summary == "a wider head"
    assert told.n_failed == 1


def test_the_editors_own_are_known_as_such() -> None:
    own = {one.lesson.individual_id: one.is_own for one in most_relevant(request(lessons=LESSONS))}
    assert own == {"g00-i01": False, "g00-i02": False, "g01-i03": True, "g01-i02": False}
    assert PARENT.individual_id == "g01-i02"
