"""All pairs of edits and a draw of triples, trained and served: `make test-edits`.

Every pair goes in one order, drawn by a fixed seed; whether edits fit is asked for both orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import torch

from darwin_exp.mutation import EDITS
from darwin_exp.protocols import EditFailed
from tests.mutation.edited import (
    PAIRS,
    assert_keeps_the_contract,
    assert_parses,
    base_genome,
    edited,
    trained,
)

pytestmark = pytest.mark.edits

N_TRIPLES = 200
FITS_AFTER = 0.9  # of the edits of its file that are about other things

ONE_ORDER = [
    tuple(Random(f"{one} {other}").sample((one, other), 2)) for one, other in PAIRS if one < other
]


def draw_triples() -> list[tuple[str, ...]]:
    rng, names, triples = Random(5), sorted(EDITS), set[tuple[str, ...]]()
    while len(triples) < N_TRIPLES:
        triple = tuple(rng.sample(names, 3))
        if all(EDITS[a].about != EDITS[b].about for a, b in combinations(triple, 2)):
            triples.add(triple)
    return sorted(triples)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the jobs say; every core has a test process of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("names", [*ONE_ORDER, *draw_triples()], ids=" ".join)
def test_a_composition_trains_and_serves(names: tuple[str, ...], tmp_path: Path) -> None:
    rng, genome, told = Random(" ".join(names)), base_genome(), []
    for name in names:
        try:
            parameters = EDITS[name].draw(genome, rng)
            told.append(f"{name} {parameters}")
            genome = EDITS[name].apply(genome, parameters)
        except EditFailed as refusal:
            pytest.skip(f"does not fit: {refusal}")
    print(*told, sep="\n")  # shown where the test fails
    assert_parses(genome)
    assert_keeps_the_contract(trained(genome, tmp_path), tmp_path)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_fits_after_most_others(name: str) -> None:
    def fits_after(other: str) -> bool:
        try:
            edited(edited(base_genome(), other, seed=1), name, seed=1)
        except EditFailed:
            return False
        return True

    # Edits see their own file only, so those of other files cannot get in the way.
    others = [one for one, other in PAIRS if other == name and EDITS[one].file == EDITS[name].file]
    refused_after = [other for other in others if not fits_after(other)]
    assert len(refused_after) <= (1 - FITS_AFTER) * len(others), refused_after
