"""Which model makes an edit: the laws of turns, of draws, and of the bandit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darwin_exp.individual import Genome, Individual, ModelSpec
from darwin_exp.journal import Journal
from darwin_exp.llm.choosing import EXPLORATION, Bandit, Choosing, Own, Weighted
from darwin_exp.protocols import EditRequest, ModelsUnavailable

URL = "http://127.0.0.1:8000/v1"
A, B, C = (ModelSpec(name, URL) for name in "abc")
GENOME = Genome.of({"train.py": "pass\n"})


def request(
    name: str = "g01-i00", ordinal: int = 0, generation: int = 1, model: ModelSpec | None = None
) -> EditRequest:
    editor = Individual("g00-i00", 0, 0, GENOME, model=model)
    return EditRequest(editor, editor, ordinal=ordinal, individual_id=name, generation=generation)


# --- owned by agents --------------------------------------------------------------------------


@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
def test_turns_keep_to_the_weights_at_every_moment(weights: list[int]) -> None:
    models = [ModelSpec(f"m{n}", URL) for n in range(len(weights))]
    own = Own(list(zip(models, map(float, weights), strict=True)))
    counts: Counter[ModelSpec] = Counter()
    total = sum(weights)
    for ordinal in range(2 * total):
        counts[own.choose(request(ordinal=ordinal))] += 1
        for model, weight in zip(models, weights, strict=True):
            assert counts[model] <= (ordinal + 1) * weight / total + 1
        if ordinal + 1 == total:
            assert [counts[model] for model in models] == weights
    assert [counts[model] for model in models] == [2 * weight for weight in weights]


def test_turns_do_not_depend_on_the_order_in_which_they_are_asked_for() -> None:
    models = ((A, 0.7), (B, 0.2), (C, 0.1))
    forwards, backwards = Own(models), Own(models)
    turns = [forwards.choose(request(ordinal=n)) for n in range(50)]
    again = [backwards.choose(request(ordinal=n)) for n in reversed(range(50))]
    assert turns == again[::-1]
    assert len(set(turns)) == 3


def test_an_agent_edits_with_the_model_that_it_owns() -> None:
    theirs = ModelSpec("fine-tuned", URL, temperature=0.3)
    own = Own(((A, 1.0), (B, 1.0)))
    assert {own.choose(request(ordinal=n, model=theirs)) for n in range(6)} == {theirs}


# --- drawn by weight ----------------------------------------------------------------------------


def test_draws_keep_to_the_weights_and_depend_on_seed_and_individual_only() -> None:
    models = ((A, 3.0), (B, 1.0), (C, 0.0))
    names = [f"g{n:02d}-i{slot:02d}" for n in range(40) for slot in range(50)]
    drawn = [Weighted(models, seed=1).choose(request(name, ordinal=7)) for name in names]
    counts = Counter(drawn)
    assert counts[C] == 0
    assert abs(counts[A] - 1500) < 100  # five standard deviations
    chooser = Weighted(models, seed=1)
    assert [chooser.choose(request(name)) for name in reversed(names)] == drawn[::-1]
    assert [Weighted(models, seed=2).choose(request(name)) for name in names] != drawn


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_weights_that_choose_nobody_are_refused(weights: tuple[float, float]) -> None:
    models = ((A, weights[0]), (B, weights[1]))
    with pytest.raises(ModelsUnavailable, match="weights"):
        Own(models)
    with pytest.raises(ModelsUnavailable, match="weights"):
        Weighted(models, seed=0)


# --- the bandit ---------------------------------------------------------------------------------


class Past:
    """A journal of individuals that models edited."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder)
        self.journal.append(
            "individual",
            "g00-i00",
            {"generation": 0, "parent_ids": [], "fitness": 1.0, "status": "OK"},
        )
        self.n = 0
        self.environment = 0
        self.close(0)

    def edit(
        self,
        model: ModelSpec,
        fitness: float | None,
        usd: float | None = 0.01,
        *,
        generation: int = 1,
        tokens: int = 100,
    ) -> None:
        self.n += 1
        name = f"g{generation:02d}-i{self.n:02d}"
        self.journal.append(
            "llm_answered",
            f"{name}/0/0",
            {
                "individual_id": name,
                "model": asdict(model),
                "tokens_in": tokens,
                "tokens_out": 0,
                "usd": usd,
            },
        )
        self.journal.append(
            "individual",
            name,
            {
                "individual_id": name,
                "generation": generation,
                "parent_ids": ["g00-i00"],
                "fitness": fitness,
                "status": "CRASHED" if fitness is None else "OK",
                **({"environment": self.environment} if self.environment else {}),
            },
        )

    def close(self, generation: int) -> None:
        self.journal.append("generation", str(generation), {"generation": generation})

    def change_conditions(self, base_fitness: float | None) -> None:
        """Open environment 1 in generation 2, where the base comes to another fitness."""
        self.environment = 1
        if base_fitness is not None:
            self.journal.append(
                "remeasured", "e1/g00-i00", {"individual_id": "g00-i00", "fitness": base_fitness}
            )


@pytest.fixture
def past(tmp_path: Path) -> Iterator[Past]:
    past = Past(tmp_path)
    yield past
    past.journal.close()


def shares(past: Past, generation: int = 2) -> list[float]:
    return Bandit(((A, 1.0), (B, 1.0)), 0, past.journal).shares(generation)


@pytest.mark.parametrize(("base_there", "is_gain"), [(2.0, False), (None, False), (1.5, True)])
def test_a_gain_is_measured_in_one_environment(
    past: Past, base_there: float | None, is_gain: bool
) -> None:
    """Twice the time makes every child fitter than its parent was before."""
    past.edit(A, 1.0)
    past.edit(B, 1.0)
    past.close(1)
    past.change_conditions(base_there)
    past.edit(A, 2.0, generation=2)
    past.edit(B, None, generation=2)
    past.close(2)
    of_a, of_b = shares(past, generation=3)
    assert (of_a > of_b + 1e-9) is is_gain


def test_a_bandit_that_has_seen_no_gain_goes_by_the_weights(past: Past) -> None:
    bandit = Bandit(((A, 3.0), (B, 1.0)), 0, past.journal)
    assert bandit.shares(1) == [0.75, 0.25]
    past.edit(A, 0.5)
    past.edit(B, None)
    past.close(1)
    assert bandit.shares(2) == [0.75, 0.25]


def test_a_bandit_shifts_to_the_model_whose_edits_gain(past: Past) -> None:
    for _ in range(10):
        past.edit(A, 1.5)
        past.edit(B, 0.9)
    past.close(1)
    first, second = shares(past)
    assert first > 0.75
    assert second >= EXPLORATION / 2


def test_a_bandit_weighs_gains_against_what_they_cost(past: Past) -> None:
    for _ in range(10):
        past.edit(A, 1.2, usd=0.10)
        past.edit(B, 1.1, usd=0.01)
    past.close(1)
    first, second = shares(past)
    assert second > 0.6 > first


def test_a_bandit_takes_a_free_model_for_cheap_and_not_for_free(past: Past) -> None:
    for _ in range(10):
        past.edit(A, 1.1, usd=0.0)
        past.edit(B, 1.1, usd=None)
    past.close(1)
    assert shares(past) == pytest.approx([0.5, 0.5])


def test_a_bandit_gives_the_untried_the_yield_of_all(past: Past) -> None:
    for _ in range(10):
        past.edit(A, 1.1)
    past.close(1)
    assert shares(past) == pytest.approx([0.5, 0.5])


def test_a_bandit_counts_only_generations_that_were_closed_before(past: Past) -> None:
    past.edit(A, 1.5)
    past.edit(B, 0.5)
    past.close(1)
    before = shares(past, 2)
    past.edit(B, 9.0, generation=2)  # a sibling that happened to finish first
    assert shares(past, 2) == before
    past.close(2)
    assert shares(past, 2) == before  # as a resumed run sees it
    assert shares(past, 3)[1] > before[1]


FITNESS = st.none() | st.floats(-5, 5)


@settings(max_examples=25)  # each writes a journal
@given(edits=st.lists(st.tuples(st.booleans(), FITNESS, st.none() | st.floats(0, 10)), max_size=12))
def test_a_bandits_shares_are_a_distribution_that_keeps_exploring(
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[bool, float | None, float | None]],
) -> None:
    past = Past(tmp_path_factory.mktemp("run"))
    for is_first, fitness, usd in edits:
        past.edit(A if is_first else B, fitness, usd)
    past.close(1)
    both = shares(past)
    past.journal.close()
    assert sum(both) == pytest.approx(1.0)
    assert min(both) >= EXPLORATION / 2 - 1e-9


def test_every_way_of_choosing_gives_the_same_answer_again(past: Past) -> None:
    models = ((A, 1.0), (B, 2.0))
    ways: list[Choosing] = [Own(models), Weighted(models, 3), Bandit(models, 3, past.journal)]
    for way in ways:
        asked = [request(f"g01-i{n:02d}", ordinal=n) for n in range(20)]
        assert [way.choose(one) for one in asked] == [way.choose(one) for one in asked]
        assert {way.choose(one) for one in asked} == {A, B}
