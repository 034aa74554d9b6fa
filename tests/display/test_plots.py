"""The pictures show every agent, whatever became of it."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.individual import Status
from darwin_exp.plots import FAILURES, generation_plots


def agent(
    generation: int, slot: int, status: str = "OK", perplexity: float = 9.0
) -> dict[str, Any]:
    is_ok = status == "OK"
    return {
        "individual_id": f"g{generation:02d}-i{slot:02d}",
        "generation": generation,
        "slot": slot,
        "status": status,
        "parent_ids": ["g00-i00"] if generation or slot else [],
        "metrics": {"val_perplexity": perplexity} if is_ok else {},
        "rates": {"mfu": 0.2} if is_ok else {},
    }


def drawn(folder: Path, individuals: list[dict[str, Any]], **more: Any) -> list[bytes]:
    files = generation_plots(folder, individuals, **more)
    assert [file.name for file in files] == ["perplexity.png", "mfu.png"]
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize(
    "individuals",
    [
        [],
        [agent(0, 0)],
        [agent(0, 0, "CRASHED")],
        [agent(0, 0), {**agent(1, 1), "metrics": {"val_perplexity": float("nan")}, "rates": None}],
    ],
)
def test_pictures_can_be_drawn_from_almost_nothing(
    tmp_path: Path, individuals: list[dict[str, Any]]
) -> None:
    for picture in drawn(tmp_path / "made", individuals):
        assert picture.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", picture[16:24])
        assert (width, height) == (900, 540)


def test_every_failure_has_its_own_mark(tmp_path: Path) -> None:
    assert set(FAILURES) == {status.value for status in Status} - {"OK"}
    assert len({mark for mark, _ in FAILURES.values()}) == len(FAILURES)
    alone = [agent(0, 0), agent(1, 1)]
    pictures = {drawn(tmp_path, [*alone, agent(1, 2, status)])[0] for status in FAILURES}
    assert len(pictures) == len(FAILURES)


def test_what_is_known_changes_the_picture(tmp_path: Path) -> None:
    rng = random.Random(0)
    agents = [agent(g, s, perplexity=rng.uniform(8, 11)) for g in range(3) for s in range(4)]
    pictures = [
        drawn(tmp_path, agents)[0],
        drawn(tmp_path, agents, base_repeats=[agent(0, 0, perplexity=p) for p in (9.5, 10.5)])[0],
        drawn(tmp_path, agents, generations=[{"generation": 0, "survivors": ["g00-i01"]}])[0],
        drawn(tmp_path, [*agents, agent(2, 5, perplexity=1e6)])[0],
    ]
    assert len(set(pictures)) == len(pictures)
    assert drawn(tmp_path, agents)[0] == pictures[0], "the same agents make the same picture"
