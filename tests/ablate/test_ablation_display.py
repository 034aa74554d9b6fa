"""The closing table says what contributions are of, and what went wrong with either side."""

import io
from typing import Any

import pytest
from rich.console import Console

from darwin_exp.ablate.display import closing_table

SUMMARY: dict[str, Any] = {
    "run_id": "r1",
    "champion_id": "g01-i00",
    "fitness": "perplexity",
    "n_seeds": 4,
    "split": "gate",
    "base": {"perplexity": None, "n": 0, "note": "1 of 1 trainings failed: CRASHED: boom"},
    "champion": {"perplexity": 8.0, "n": 4, "note": ""},
    "parts": [],
    "pruned": None,
}


def shown(**changes: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(closing_table({**SUMMARY, **changes}))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def test_a_base_that_failed_is_told() -> None:
    assert "base - (n=0; 1 of 1 trainings failed: CRASHED: boom), champion 8.000 (n=4)" in shown()


@pytest.mark.parametrize(("fitness", "is_said"), [("perplexity", False), ("mfu", True)])
def test_that_contributions_are_of_perplexity_only_is_said_where_fitness_is_another(
    fitness: str, is_said: bool
) -> None:
    assert (f"The run's fitness is {fitness}" in shown(fitness=fitness)) is is_said
