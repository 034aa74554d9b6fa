"""An approved data set, from the approval to the files that trainings are given."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from darwin_exp.conditions import Conditions
from darwin_exp.effects import Effects
from darwin_exp.hitl.inbox import Author, Inbox
from darwin_exp.hitl.requests import Decision, Request, RequestType, answer, ask, fold
from darwin_exp.individual import DataSpec, Genome, Individual
from darwin_exp.journal import Journal
from darwin_exp.means import Means
from darwin_exp.trials import Broken
from data import DatasetRequest, prepare

ADA = Author("ada", "web")


def text(seed: int) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=6)) for _ in range(500)]
    return "\n\n".join(" ".join(rng.choices(words, k=40)) for _ in range(100)) + "\n"


def test_g4_an_approved_text_is_prepared_hashed_and_given_to_every_training_from_then_on(
    tmp_path: Path,
) -> None:
    (tmp_path / "own.txt").write_text(text(1))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "poems.txt").write_text(text(2))
    own = prepare(
        DatasetRequest("textdir", path=tmp_path / "own.txt", root=tmp_path / "data"), print
    )
    content = json.dumps(
        {"source": "textdir", "path": str(tmp_path / "more"), "licence": "CC0", "most_mb": 1}
    )
    request = Request("run", RequestType.DATASET, "why", "", content, "g00-i01", 0)
    inbox = Inbox(tmp_path / "inbox.sqlite")
    ask(inbox, request)
    journal = Journal(tmp_path)
    means = Means(own.folder, tmp_path / "data", dataset_sources=("textdir",))
    effects, base = Effects(journal, means), Individual("g00-i00", 0, 0, Genome.of({}))

    def conditions(generation: int) -> Conditions:
        board = fold(inbox.entries())
        return effects.carry_out(generation, board, [base], {}, 2).conditions

    try:
        assert conditions(1) == Conditions()  # the control: nobody has approved it
        standing = fold(inbox.entries()).requests[request.request_id]
        answer(inbox, standing, Decision.APPROVE, ADA, request.content_hash)
        granted = conditions(2)
        (effect,) = journal.of_kind("effect")
        assert effect.payload["details"]["licence"] == "CC0"
        assert effect.payload["details"]["tokens"] > 10_000
        data = granted.data(DataSpec(own.folder, own.content_hash, own.vocab_size))
        (extra,) = data.extra_train
        assert extra.stat().st_size == effect.payload["details"]["tokens"] * own.token_bytes
        assert granted.environment_id({}) != Conditions().environment_id({})
        effects.verify(granted)
        with extra.open("r+b") as file:
            file.write(b"\x01\x01")
        with pytest.raises(Broken, match="another text"):
            effects.verify(granted)
    finally:
        journal.close()
