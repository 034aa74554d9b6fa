"""Selection: who lives on and who reproduces.

Reads: id, status, fitness, metrics and rates of individuals.
Writes: nothing.
Never: draws a random number that does not come from the `rng` it is given, or lets the order in
which individuals arrive decide anything. Individuals that are not OK, or whose fitness is unknown,
neither survive nor reproduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random

from darwin_exp.individual import Individual

MINIMISED_SUFFIXES = ("_perplexity", "_bpb")


def best_first(population: Iterable[Individual]) -> list[Individual]:
    """Return the evaluated individuals, each once, from the fittest down; ties go by id."""
    evaluated = {i.individual_id: i for i in population if i.is_ok and math.isfinite(_fitness(i))}
    return sorted(evaluated.values(), key=_by_fitness)


def pareto_front(individuals: Iterable[Individual], objectives: Sequence[str]) -> list[Individual]:
    """Return the OK individuals that no other one dominates, best in the first objective first.

    Perplexities and bits per byte are minimised, everything else is maximised. An individual in
    which an objective was not measured is on no front.
    """
    costs = {
        i.individual_id: (cost, i)
        for i in individuals
        if i.is_ok and (cost := _costs(i, objectives)) is not None
    }
    front = [
        (cost, name, i)
        for name, (cost, i) in costs.items()
        if not any(_dominates(other, cost) for other, _ in costs.values())
    ]
    return [i for _, _, i in sorted(front, key=lambda member: member[:2])]


@dataclass(frozen=True)
class Truncation:
    """Keeps the n fittest and lets each of them reproduce equally often.

    Attributes:
        elitism: implied by truncation; held so that every selection takes the same option.
    """

    elitism: int = 1

    def __post_init__(self) -> None:
        _check_elitism(self.elitism)

    def survivors(
        self,
        population: Sequence[Individual],
        n: int,
        rng: Random,
    ) -> list[Individual]:
        """Return the n fittest."""
        return best_first(population)[: max(0, n)]

    def parents(self, survivors: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return n parents in shuffled rounds, so that shares differ by one at most."""
        pool = _reproducing(survivors)
        drawn: list[Individual] = []
        while len(drawn) < n:
            drawn += rng.sample(pool, len(pool))
        return drawn[:n]


@dataclass(frozen=True)
class Tournament:
    """Draws a few individuals, with replacement, and lets the fittest of them win.

    Attributes:
        size: contestants per tournament; 1 is chance, more is stronger pressure.
        elitism: how many of the fittest survive without a contest.
    """

    size: int = 3
    elitism: int = 1

    def __post_init__(self) -> None:
        _check_elitism(self.elitism)
        if self.size < 1:
            raise ValueError(f"selection.size must be at least 1, not {self.size}")

    def survivors(self, population: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return the elite and the winners of tournaments among those not yet chosen."""

        def choose(rest: list[Individual], k: int) -> list[Individual]:
            return [rest.pop(self._winner(rest, rng)) for _ in range(k)]

        return _with_elite(population, n, self.elitism, choose)

    def parents(self, survivors: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return the winners of n tournaments."""
        pool = _reproducing(survivors)
        return [pool[self._winner(pool, rng)] for _ in range(n)]

    def _winner(self, ranked: Sequence[Individual], rng: Random) -> int:
        return min(rng.randrange(len(ranked)) for _ in range(self.size))


@dataclass(frozen=True)
class Roulette:
    """Draws with weights that fall linearly with rank: of k individuals the best has k, the last 1.

    Raw fitness cannot be a weight here: minus log perplexity is negative, and one diverged
    candidate would make all others look alike. Ranks do not change when a constant is added to
    every fitness. Equal fitness has equal weight, the mean over the ranks it takes up.
    Source: linear ranking, J. E. Baker 1985.

    Attributes:
        elitism: how many of the fittest survive without a draw.
    """

    elitism: int = 1

    def __post_init__(self) -> None:
        _check_elitism(self.elitism)

    def survivors(self, population: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return the elite and weighted draws, without replacement, from the rest."""

        def choose(rest: list[Individual], k: int) -> list[Individual]:
            weights, chosen = rank_weights(rest), []
            for _ in range(k):
                [place] = rng.choices(range(len(rest)), weights)
                weights.pop(place)
                chosen.append(rest.pop(place))
            return chosen

        return _with_elite(population, n, self.elitism, choose)

    def parents(self, survivors: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return n weighted draws with replacement."""
        pool = _reproducing(survivors)
        return rng.choices(pool, rank_weights(pool), k=n)


@dataclass(frozen=True)
class NSGA2:
    """Prefers what fewer others dominate and, among equals, what stands alone on its front.

    Individuals in which an objective was not measured come after every front, by fitness.
    Source: NSGA-II, Deb, Pratap, Agarwal and Meyarivan 2002.

    Attributes:
        objectives: names of metrics or rates; perplexities and bits per byte are minimised.
        elitism: how many of the fittest survive whatever front they are on.
    """

    objectives: tuple[str, ...] = ("val_perplexity", "mfu")
    elitism: int = 1

    def __post_init__(self) -> None:
        _check_elitism(self.elitism)
        if not self.objectives:
            raise ValueError("selection.objectives must name at least one metric")

    def survivors(
        self,
        population: Sequence[Individual],
        n: int,
        rng: Random,
    ) -> list[Individual]:
        """Return the elite and then front after front, the last one cut by crowding."""
        order = self._ordered(best_first(population))

        def choose(rest: list[Individual], k: int) -> list[Individual]:
            left = {i.individual_id for i in rest}
            return [i for i in order if i.individual_id in left][:k]

        return _with_elite(population, n, self.elitism, choose)

    def parents(self, survivors: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return the winners of n tournaments of two, by front and then by crowding."""
        order = self._ordered(_reproducing(survivors))
        size = len(order)
        return [order[min(rng.randrange(size), rng.randrange(size))] for _ in range(n)]

    def _ordered(self, pool: list[Individual]) -> list[Individual]:
        order: list[Individual] = []
        rest = pool
        while front := pareto_front(rest, self.objectives):
            distance = crowding_distances(front, self.objectives)
            front.sort(key=lambda i: (-distance[i.individual_id], *_by_fitness(i)))
            order += front
            placed = {i.individual_id for i in front}
            rest = [i for i in rest if i.individual_id not in placed]
        return order + rest


@dataclass(frozen=True)
class RandomSelection:
    """Selects by chance: the control that tells what selection itself contributes.

    Attributes:
        elitism: how many of the fittest survive without a draw; 0 for a true control.
    """

    elitism: int = 0

    def __post_init__(self) -> None:
        _check_elitism(self.elitism)

    def survivors(self, population: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return the elite, if any, and uniform draws without replacement from the rest."""
        return _with_elite(population, n, self.elitism, rng.sample)

    def parents(self, survivors: Sequence[Individual], n: int, rng: Random) -> list[Individual]:
        """Return n uniform draws with replacement."""
        return rng.choices(_reproducing(survivors), k=n)


def rank_weights(ranked: Sequence[Individual]) -> list[float]:
    """Return the roulette weight of each individual of a list that is sorted best first."""
    weights: list[float] = []
    for _, group in groupby(ranked, key=_fitness):
        first, n_equal = len(weights), len(list(group))
        weights += [len(ranked) - first - (n_equal - 1) / 2] * n_equal
    return weights


def crowding_distances(front: Sequence[Individual], objectives: Sequence[str]) -> dict[str, float]:
    """Return, by id, how far apart each individual's neighbours on a front are; ends are infinite.

    Each objective is scaled by its range on the front. One in which all are equal says nothing
    about crowding and adds nothing.
    """
    costs = {i.individual_id: _costs(i, objectives) or () for i in front}
    distance = dict.fromkeys(costs, 0.0)
    for axis in range(len(objectives)):
        line = sorted(costs, key=lambda name: (costs[name][axis], name))
        low, high = costs[line[0]][axis], costs[line[-1]][axis]
        if low == high:
            continue
        distance[line[0]] = distance[line[-1]] = math.inf
        for before, name, after in zip(line, line[1:], line[2:], strict=False):
            distance[name] += (costs[after][axis] - costs[before][axis]) / (high - low)
    return distance


def _with_elite(
    population: Sequence[Individual],
    n: int,
    elitism: int,
    choose: Callable[[list[Individual], int], list[Individual]],
) -> list[Individual]:
    ranked = best_first(population)
    n = max(0, min(n, len(ranked)))
    n_elite = min(elitism, n)
    return sorted(ranked[:n_elite] + choose(ranked[n_elite:], n - n_elite), key=_by_fitness)


def _reproducing(survivors: Sequence[Individual]) -> list[Individual]:
    pool = best_first(survivors)
    if not pool:
        raise ValueError("no evaluated individual survived, so there is nobody to reproduce")
    return pool


def _check_elitism(elitism: int) -> None:
    if elitism < 0:
        raise ValueError(f"selection.elitism must be 0 or more, not {elitism}")


def _fitness(individual: Individual) -> float:
    return math.nan if individual.fitness is None else individual.fitness


def _by_fitness(individual: Individual) -> tuple[float, str]:
    return -_fitness(individual), individual.individual_id


def _costs(individual: Individual, objectives: Sequence[str]) -> tuple[float, ...] | None:
    """Return every objective as something to minimise; None where one was not measured."""
    costs: list[float] = []
    for name in objectives:
        value = individual.measured(name)
        if value is None or not math.isfinite(value):
            return None
        costs.append(value if name.endswith(MINIMISED_SUFFIXES) else -value)
    return tuple(costs)


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
