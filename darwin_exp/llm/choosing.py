"""Choosing: which language model makes an edit, the same one whenever that is asked again."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import isfinite
from typing import Any, Protocol

from darwin_exp import randomness
from darwin_exp.individual import ModelSpec
from darwin_exp.journal import Journal
from darwin_exp.protocols import EditRequest, ModelsUnavailable

WeightedModels = Sequence[tuple[ModelSpec, float]]

EXPLORATION = 0.2  # share of a bandit's edits that go by the configured weights, whatever it saw
PRIOR_EDITS = 4.0  # edits' worth of the average that every model starts with
# What a self-hosted model's tokens are taken to cost: power is cheap, and not free.
FLOOR_USD_PER_TOKEN = 2e-8


class Choosing(Protocol):
    """Says which model makes an edit. Pure: it looks at the request and at closed generations."""

    def choose(self, request: EditRequest) -> ModelSpec:
        """Return the model for this edit."""
        ...


class Own:
    """Lets every agent edit with the model that it owns.

    An agent that owns none, such as the base, leaves the edit to each model in turn, as often as
    the weights say: smooth weighted round-robin, by how many individuals were requested before.

    Source: the order in which nginx takes weighted servers.

    Raises:
        ModelsUnavailable: no model has a weight.
    """

    def __init__(self, models: WeightedModels) -> None:
        _refuse_bad_weights(models)
        self._models = [model for model, _ in models]
        self._weights = [Fraction(weight) for _, weight in models]  # exact, however many turns
        self._credits = [Fraction(0) for _ in models]
        self._turns: list[ModelSpec] = []
        self._mutex = threading.Lock()

    def choose(self, request: EditRequest) -> ModelSpec:
        """Return the editor's own model, or the one whose turn it is."""
        return request.editor.model or self._in_turn(request.ordinal)

    def _in_turn(self, ordinal: int) -> ModelSpec:
        with self._mutex:
            while len(self._turns) <= ordinal:
                self._credits = [
                    credit + weight
                    for credit, weight in zip(self._credits, self._weights, strict=True)
                ]
                richest = self._credits.index(max(self._credits))
                self._credits[richest] -= sum(self._weights)
                self._turns.append(self._models[richest])
            return self._turns[ordinal]


class Weighted:
    """Draws a model for each edit, as often as the weights say, from the run's seed.

    Raises:
        ModelsUnavailable: no model has a weight.
    """

    def __init__(self, models: WeightedModels, seed: int) -> None:
        _refuse_bad_weights(models)
        self._models = [model for model, _ in models]
        self._weights = [weight for _, weight in models]
        self._seed = seed

    def choose(self, request: EditRequest) -> ModelSpec:
        """Return the model that was drawn for this individual."""
        return _drawn(self._seed, request, self._models, self._weights)


class Bandit:
    """Draws a model for each edit, more often one whose edits gain more fitness per dollar.

    The rule. For each individual of a closed generation that a model answered for, its gain is
    what its fitness rose above its parent's (nothing where it fell, failed or was not measured),
    and its cost what those answers cost, but at least FLOOR_USD_PER_TOKEN. With the mean gain and
    cost over all models and their individuals, a model's yield is

        (its gains + PRIOR_EDITS * mean gain) / (its costs + PRIOR_EDITS * mean cost),

    so that one that was never tried starts at the yield of all together. Of the edits, EXPLORATION
    go by the configured weights and the others by weight times yield. As long as nothing has
    gained anything, all go by the weights.

    Only generations before the edit's own count. All their individuals are in the journal then, in
    whichever order siblings finished.

    Raises:
        ModelsUnavailable: no model has a weight.
    """

    def __init__(self, models: WeightedModels, seed: int, journal: Journal) -> None:
        _refuse_bad_weights(models)
        self._models = [model for model, _ in models]
        total = sum(weight for _, weight in models)
        self._weights = [weight / total for _, weight in models]
        self._seed = seed
        self._journal = journal

    def choose(self, request: EditRequest) -> ModelSpec:
        """Return the model that was drawn for this individual."""
        return _drawn(self._seed, request, self._models, self.shares(request.generation))

    def shares(self, generation: int) -> list[float]:
        """Return how likely each model is in a generation; they sum to 1."""
        known = self._records(generation)
        records = [known.get(_name(model), _Record()) for model in self._models]
        n_edits = sum(record.n_edits for record in records)
        gain = sum(record.gain for record in records)
        cost = sum(record.usd for record in records)
        if gain <= 0.0 or cost <= 0.0:
            return list(self._weights)
        prior_gain, prior_cost = (PRIOR_EDITS * total / n_edits for total in (gain, cost))
        pulls = [
            weight * (record.gain + prior_gain) / (record.usd + prior_cost)
            for weight, record in zip(self._weights, records, strict=True)
        ]
        return [
            EXPLORATION * weight + (1.0 - EXPLORATION) * pull / sum(pulls)
            for weight, pull in zip(self._weights, pulls, strict=True)
        ]

    def _records(self, generation: int) -> dict[str, _Record]:
        """Return what each model's edits gained and cost before a generation."""
        events = self._journal.events()
        closed = {event.payload["generation"] for event in events if event.kind == "generation"}
        individuals = {
            event.key: event.payload
            for event in events
            if event.kind == "individual" and event.payload["generation"] in closed
        }
        again = {event.key: event.payload for event in events if event.kind == "remeasured"}
        costs: dict[tuple[str, str], float] = {}  # by model and individual
        for event in events:
            payload = event.payload
            child = individuals.get(payload.get("individual_id", ""))
            if event.kind == "llm_answered" and child and child["generation"] < generation:
                tokens = payload["tokens_in"] + payload["tokens_out"]
                usd = max(payload["usd"] or 0.0, tokens * FLOOR_USD_PER_TOKEN)
                edit = (_name(ModelSpec(**payload["model"])), payload["individual_id"])
                costs[edit] = costs.get(edit, 0.0) + usd
        records: dict[str, _Record] = {}
        for (model, individual_id), usd in sorted(costs.items()):
            before = records.get(model, _Record())
            gain = _gain(individuals[individual_id], individuals, again)
            records[model] = _Record(before.n_edits + 1, before.gain + gain, before.usd + usd)
        return records


@dataclass(frozen=True)
class _Record:
    """What a model's edits have gained and cost so far."""

    n_edits: int = 0
    gain: float = 0.0
    usd: float = 0.0


def _gain(
    child: Mapping[str, Any],
    individuals: Mapping[str, Mapping[str, Any]],
    again: Mapping[str, Mapping[str, Any]],
) -> float:
    """Return by how much a child is fitter than its parent was in the same environment.

    Args:
        again: what individuals came to in later environments, by "eK/NAME".
    """
    name = child["parent_ids"][0] if child["parent_ids"] else ""
    environment, parent = child.get("environment", 0), individuals.get(name, {})
    if parent.get("environment", 0) != environment:
        parent = again.get(f"e{environment}/{name}", {})
    after, before = child["fitness"], parent.get("fitness")
    if child["status"] != "OK" or after is None or before is None:
        return 0.0
    return max(0.0, float(after) - float(before))


def _drawn(
    seed: int, request: EditRequest, models: Sequence[ModelSpec], weights: Sequence[float]
) -> ModelSpec:
    rng = randomness.stream(seed, "model", request.individual_id)
    return rng.choices(models, weights)[0]


def _name(model: ModelSpec) -> str:
    return repr(sorted(asdict(model).items()))


def _refuse_bad_weights(models: WeightedModels) -> None:
    weights = [weight for _, weight in models]
    if not all(isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise ModelsUnavailable(
            "mutator.models: the weights must not be negative, and one must be above 0"
        )
