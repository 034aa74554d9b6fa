"""What requests ask for: told exactly, or refused with the form that would do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from darwin_exp.hitl.asked import Refused, RequestType
from darwin_exp.hitl.wishes import DatasetWish, Setting, TreeWish, requirement_of
from darwin_exp.individual import Genome

WISH = {"source": "textdir", "path": "/data/poems", "licence": "CC0", "most_mb": 10}
CODE = Genome.of({"train.py": "import model\n", "model.py": "x = 1\n", "parts/loss.py": "y = 1\n"})
TREE = RequestType.FILE_STRUCTURE


def test_g4_an_exact_wish_is_read() -> None:
    wish = DatasetWish.read(json.dumps(WISH), {"textdir"})
    assert wish == DatasetWish("textdir", "/data/poems", "CC0", 10)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"source": "huggingface"}, "not allowed"),
        ({"source": ""}, "some text"),
        ({"licence": " "}, "some text"),
        ({"licence": None}, "some text"),
        ({"most_mb": 0}, "most_mb"),
        ({"most_mb": 1e9}, "most_mb"),
        ({"most_mb": True}, "most_mb"),
        ({"most_mb": 100_000}, "most_mb"),
        ({"val": "/data/easy"}, "nothing more"),
        ({"split": "test"}, "nothing more"),
        ({"replaces": "val"}, "nothing more"),
    ],
)
def test_g4_what_is_not_allowed_or_not_exact_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(Refused, match=why):
        DatasetWish.read(json.dumps({**WISH, **change}), {"textdir"})


@pytest.mark.parametrize("content", ["more poems, please", "[]", "null", "", "{}", "[" * 100_000])
def test_g4_words_are_no_wish(content: str) -> None:
    with pytest.raises(Refused, match="exactly"):
        DatasetWish.read(content, {"textdir"})


def test_g4_no_source_is_allowed_by_itself() -> None:
    with pytest.raises(Refused, match="allowed: none"):
        DatasetWish.read(json.dumps(WISH), ())


def test_g3_a_restructuring_says_what_becomes_of_every_file() -> None:
    wish = TreeWish.read(
        TREE,
        json.dumps(
            {
                "moves": {"parts/loss.py": "losses.py"},
                "files": {"train.py": "import losses\n"},
                "removes": ["model.py"],
            }
        ),
    )
    written, gone = wish.changes(CODE)
    assert written == {"losses.py": "y = 1\n", "train.py": "import losses\n"}
    assert sorted(gone) == ["model.py", "parts/loss.py"]


def test_two_files_may_change_places() -> None:
    wish = TreeWish({}, {"train.py": "model.py", "model.py": "train.py"}, ())
    assert wish.changes(CODE) == ({"model.py": "import model\n", "train.py": "x = 1\n"}, [])


@pytest.mark.parametrize(
    "told",
    [
        {"moves": {"model.py": "../model.py"}},
        {"moves": {"model.py": "/etc/model.py"}},
        {"moves": {"model.py": "a/../../model.py"}},
        {"moves": {"model.py": "Train.py"}},
        {"moves": {"model.py": "train.py"}},
        {"moves": {"model.py": "train.py/model.py"}},
        {"moves": {"nowhere.py": "somewhere.py"}},
        {"moves": {"model.py": "m.py"}, "removes": ["model.py"]},
        {"files": {"ｔrain.py": "x"}},
        {"files": {"out/x.py": "x"}},
        {"files": {"job.json": "{}"}},
        {"files": {".git/config.txt": "x"}},
        {"files": {"x\u0000.py": "x"}},
        {"files": {"a\\b.py": "x"}},
        {"removes": ["../../train.py"]},
    ],
)
def test_g3_a_restructuring_stays_in_the_tree(told: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        TreeWish.read(TREE, json.dumps(told)).changes(CODE)


@pytest.mark.parametrize("told", [{}, {"moves": []}, {"files": {"a.py": 1}}, {"removes": "a"}, []])
def test_a_restructuring_that_is_not_exact_is_refused(told: Any) -> None:
    with pytest.raises(Refused):
        TreeWish.read(TREE, json.dumps(told))


def test_a_script_is_one_file() -> None:
    wish = TreeWish.read(RequestType.SCRIPT, json.dumps({"path": "tune.py", "text": "z = 1\n"}))
    assert wish.changes(CODE) == ({"tune.py": "z = 1\n"}, [])
    with pytest.raises(Refused, match="exactly"):
        TreeWish.read(RequestType.SCRIPT, json.dumps({"path": "tune.py"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("budget_seconds", 0),
        ("budget_seconds", True),
        ("budget_seconds", "24"),
        ("budget_seconds", 1e400),
        ("max_steps", 1.5),
        ("threads", 2),
        ("sandbox.allow_untrusted", True),
    ],
)
def test_g9_resources_are_three_numbers_above_zero(key: str, value: Any) -> None:
    assert Setting.read('{"key": "max_steps", "value": 200}') == Setting("max_steps", 200)
    with pytest.raises(Refused):
        Setting.read(json.dumps({"key": key, "value": value}))


def test_a_library_is_named_by_its_requirement() -> None:
    assert requirement_of('{"requirement": "einops==0.8.1"}') == "einops==0.8.1"
    with pytest.raises(Refused, match="exactly"):
        requirement_of("einops")
