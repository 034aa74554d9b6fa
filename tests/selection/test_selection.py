"""Every selection keeps the same promises; each keeps one or two of its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin_exp.individual import Genome, Individual, Status
from darwin_exp.protocols import Selector
from darwin_exp.selection import (
    NSGA2,
    RandomSelection,
    Roulette,
    Tournament,
    Truncation,
    best_first,
    crowding_distances,
    pareto_front,
    rank_weights,
)

VARIANTS: list[Callable[[int], Selector]] = [
    lambda elitism: Truncation(elitism=elitism),
    lambda elitism: Tournament(elitism=elitism),
    lambda elitism: Roulette(elitism=elitism),
    lambda elitism: NSGA2(elitism=elitism),
    lambda elitism: RandomSelection(elitism=elitism),
]
variants = st.sampled_from(VARIANTS)
seeds = st.integers(0, 2**32)


def individual(
    name: str,
    fitness: float | None,
    status: Status = Status.OK,
    perplexity: float | None = None,
    mfu: float | None = None,
) -> Individual:
    return Individual(
        individual_id=name,
        generation=1,
        slot=0,
        genome=Genome(()),
        status=status,
        metrics={} if perplexity is None else {"val_perplexity": perplexity},
        rates={} if mfu is None else {"mfu": mfu},
        fitness=fitness,
    )


# Integers from a small range make ties common.
values = [*map(float, range(1, 7)), None]


@st.composite
def populations(draw: st.DrawFn) -> list[Individual]:
    # Most are evaluated, and there are usually more of them than places.
    size = draw(st.sampled_from([0, 1, 2, 5, 8, 8, 12, 12]))
    return [
        individual(
            f"g1-s{k}",
            fitness=draw(st.sampled_from([*map(float, range(-4, 4)), None])),
            status=draw(st.sampled_from([*[Status.OK] * 5, Status.CRASHED])),
            perplexity=draw(st.sampled_from(values)),
            mfu=draw(st.sampled_from(values)),
        )
        for k in range(size)
    ]


def ids(individuals: Sequence[Individual]) -> list[str]:
    return [i.individual_id for i in individuals]


class TestEverySelection:
    """The contract of the Selector protocol."""

    @given(variants, populations(), st.integers(0, 14), st.integers(0, 5), seeds)
    def test_survivors_are_evaluated_distinct_and_as_many_as_there_are(
        self,
        variant: Callable[[int], Selector],
        population: list[Individual],
        n: int,
        elitism: int,
        seed: int,
    ) -> None:
        survivors = variant(elitism).survivors(population, n, Random(seed))
        n_evaluated = sum(i.is_ok and i.fitness is not None for i in population)
        assert len(survivors) == min(n, n_evaluated)
        assert len(set(ids(survivors))) == len(survivors)
        assert all(i.is_ok and i.fitness is not None for i in survivors)

    @given(variants, populations(), st.integers(0, 14), st.integers(0, 5), seeds)
    def test_the_elite_always_survives(
        self,
        variant: Callable[[int], Selector],
        population: list[Individual],
        n: int,
        elitism: int,
        seed: int,
    ) -> None:
        survivors = variant(elitism).survivors(population, n, Random(seed))
        elite = best_first(population)[: min(n, elitism)]
        assert set(ids(elite)) <= set(ids(survivors))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_elite_survives_every_draw(self, variant: Callable[[int], Selector]) -> None:
        for seed in range(60):
            assert ids(variant(1).survivors(four(), 1, Random(seed))) == ["a"]
            assert set("ab") <= set(ids(variant(2).survivors(four(), 3, Random(seed))))

    @given(variants, populations(), st.integers(0, 8), seeds, st.randoms(use_true_random=False))
    def test_the_order_of_arrival_decides_nothing(
        self,
        variant: Callable[[int], Selector],
        population: list[Individual],
        n: int,
        seed: int,
        shuffler: Random,
    ) -> None:
        selector = variant(1)
        shuffled = list(population)
        shuffler.shuffle(shuffled)
        survivors = selector.survivors(population, n, Random(seed))
        assert survivors == selector.survivors(shuffled, n, Random(seed))
        if survivors:
            again = list(survivors)
            shuffler.shuffle(again)
            parents = selector.parents(survivors, n, Random(seed))
            assert parents == selector.parents(again, n, Random(seed))

    @given(variants, populations(), st.integers(1, 8), seeds)
    def test_the_same_random_numbers_choose_the_same(
        self,
        variant: Callable[[int], Selector],
        population: list[Individual],
        n: int,
        seed: int,
    ) -> None:
        before = list(population)
        first = variant(1).survivors(population, n, Random(seed))
        assert first == variant(1).survivors(population, n, Random(seed))
        assert population == before
        if first:
            parents = variant(1).parents(first, 9, Random(seed))
            assert parents == variant(1).parents(first, 9, Random(seed))

    @given(variants, populations(), st.integers(0, 9), seeds)
    def test_parents_come_from_the_survivors_and_are_as_many_as_asked_for(
        self,
        variant: Callable[[int], Selector],
        population: list[Individual],
        n: int,
        seed: int,
    ) -> None:
        survivors = variant(1).survivors(population, 5, Random(seed))
        if survivors:
            parents = variant(1).parents(survivors, n, Random(seed))
            assert len(parents) == n
            assert set(ids(parents)) <= set(ids(survivors))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_nobody_to_reproduce_is_said_in_a_sentence(
        self, variant: Callable[[int], Selector]
    ) -> None:
        with pytest.raises(ValueError, match="nobody to reproduce"):
            variant(1).parents([], 3, Random(0))

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_a_negative_elite_is_refused(self, variant: Callable[[int], Selector]) -> None:
        with pytest.raises(ValueError, match=r"selection\.elitism"):
            variant(-1)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("fitness", [math.nan, math.inf])
    def test_a_fitness_that_is_no_number_never_survives(
        self, variant: Callable[[int], Selector], fitness: float
    ) -> None:
        population = [individual("a", fitness), individual("b", -9.0)]
        assert ids(variant(1).survivors(population, 2, Random(0))) == ["b"]


def four() -> list[Individual]:
    return [individual(name, fitness) for name, fitness in zip("abcd", (4.0, 3, 2, 1), strict=True)]


def shares(selector: Selector, survivors: list[Individual], n: int = 4000) -> dict[str, float]:
    counts = Counter(ids(selector.parents(survivors, n, Random(7))))
    return {name: counts[name] / n for name in ids(survivors)}


def test_truncation_keeps_the_fittest_in_order() -> None:
    assert ids(Truncation(0).survivors(four()[::-1], 2, Random(0))) == ["a", "b"]


@given(st.integers(1, 6), st.integers(0, 20), seeds)
def test_truncation_lets_all_survivors_reproduce_equally_often(
    size: int, n: int, seed: int
) -> None:
    survivors = [individual(f"s{k}", float(k)) for k in range(size)]
    counts = Counter(ids(Truncation().parents(survivors, n, Random(seed))))
    shares_of_all = [counts[name] for name in ids(survivors)]
    assert max(shares_of_all) - min(shares_of_all) <= 1


def test_a_tournament_of_three_is_won_as_often_as_probability_says() -> None:
    expected = {"a": 37 / 64, "b": 19 / 64, "c": 7 / 64, "d": 1 / 64}
    assert shares(Tournament(size=3), four()) == pytest.approx(expected, abs=0.03)


def test_a_tournament_of_one_is_chance() -> None:
    assert shares(Tournament(size=1), four()) == pytest.approx(
        dict.fromkeys("abcd", 0.25), abs=0.03
    )


def test_a_tournament_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match=r"selection\.size"):
        Tournament(size=0)


def test_roulette_draws_in_proportion_to_rank_even_where_fitness_is_negative() -> None:
    survivors = [replace(i, fitness=(i.fitness or 0) - 100) for i in four()]
    expected = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    assert shares(Roulette(), survivors) == pytest.approx(expected, abs=0.03)


def test_roulette_gives_equals_the_same_weight() -> None:
    tied = [individual("a", 2.0), individual("b", 1.0), individual("c", 1.0), individual("d", 0.0)]
    assert rank_weights(tied) == [4.0, 2.5, 2.5, 1.0]


@given(populations(), st.integers(-1000, 1000), st.integers(0, 8), seeds)
def test_roulette_does_not_notice_a_constant_added_to_every_fitness(
    population: list[Individual], constant: int, n: int, seed: int
) -> None:
    moved = [
        replace(i, fitness=None if i.fitness is None else i.fitness + constant) for i in population
    ]
    survivors = Roulette().survivors(population, n, Random(seed))
    moved_survivors = Roulette().survivors(moved, n, Random(seed))
    assert ids(survivors) == ids(moved_survivors)
    if survivors:
        assert ids(Roulette().parents(survivors, 9, Random(seed))) == ids(
            Roulette().parents(moved_survivors, 9, Random(seed))
        )


def test_random_selection_does_not_look_at_fitness() -> None:
    assert shares(RandomSelection(), four()) == pytest.approx(dict.fromkeys("abcd", 0.25), abs=0.03)
    counts: Counter[str] = Counter()
    for seed in range(1000):
        counts.update(ids(RandomSelection().survivors(four(), 2, Random(seed))))
    assert {name: counts[name] / 1000 for name in "abcd"} == pytest.approx(
        dict.fromkeys("abcd", 0.5), abs=0.06
    )


def dominates(one: Individual, other: Individual) -> bool:
    """Perplexity down, MFU up; written apart from the implementation."""
    p, q = one.metrics["val_perplexity"], other.metrics["val_perplexity"]
    u, v = one.rates["mfu"], other.rates["mfu"]
    return p <= q and u >= v and (p < q or u > v)


def on_both(population: Sequence[Individual]) -> list[Individual]:
    return [i for i in population if i.is_ok and i.metrics and i.rates]


@given(populations())
def test_the_front_is_what_nothing_dominates(population: list[Individual]) -> None:
    front = pareto_front(population, ("val_perplexity", "mfu"))
    measured = on_both(population)
    expected = [i for i in measured if not any(dominates(o, i) for o in measured)]
    assert sorted(ids(front)) == sorted(ids(expected))


@given(populations(), st.integers(0, 12), seeds)
def test_nsga2_leaves_nobody_behind_who_dominates_a_survivor(
    population: list[Individual], n: int, seed: int
) -> None:
    survivors = NSGA2(elitism=0).survivors(population, n, Random(seed))
    left = [i for i in population if i not in survivors and i.fitness is not None]
    for kept in survivors:
        if on_both([kept]):
            assert not any(dominates(other, kept) for other in on_both(left))
        else:
            assert not on_both(left), "an objective was not measured, so it ranks last"


def test_nsga2_minimises_perplexity_and_maximises_mfu() -> None:
    fine = individual("fine", -2.0, perplexity=7.0, mfu=0.1)
    fast = individual("fast", -3.0, perplexity=9.0, mfu=0.4)
    poor = individual("poor", -1.0, perplexity=9.5, mfu=0.1)
    blind = individual("blind", -0.5, perplexity=1.0)
    everyone = [poor, blind, fast, fine]
    assert ids(pareto_front(everyone, ("val_perplexity", "mfu"))) == ["fine", "fast"]
    assert set(ids(NSGA2(elitism=0).survivors(everyone, 2, Random(0)))) == {"fine", "fast"}
    assert set(ids(NSGA2(elitism=0).survivors(everyone, 3, Random(0)))) == {"fine", "fast", "poor"}


def test_nsga2_thins_out_the_crowded_part_of_a_front() -> None:
    points = {"a": (1.0, 0.1), "b": (1.1, 0.12), "c": (1.2, 0.14), "d": (3.0, 0.5), "e": (5.0, 0.9)}
    front = [individual(name, 0.0, perplexity=p, mfu=u) for name, (p, u) in points.items()]
    assert set(ids(NSGA2(elitism=0).survivors(front, 3, Random(0)))) == {"a", "d", "e"}
    distances = crowding_distances(front, ("val_perplexity", "mfu"))
    assert distances["a"] == distances["e"] == math.inf
    assert distances["b"] == pytest.approx(0.2 / 4 + 0.04 / 0.8)


def test_nsga2_parents_come_from_the_front_more_often() -> None:
    fine = individual("fine", 0.0, perplexity=1.0, mfu=0.5)
    poor = individual("poor", 9.0, perplexity=2.0, mfu=0.4)
    assert shares(NSGA2(), [poor, fine]) == pytest.approx({"poor": 0.25, "fine": 0.75}, abs=0.03)


def test_nsga2_without_objectives_is_refused() -> None:
    with pytest.raises(ValueError, match=r"selection\.objectives"):
        NSGA2(objectives=())
