"""Memory: who is told what, in which order, and what lies on disk."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Thread
from typing import Any

import pytest

from darwin_exp.individual import Edit, Genome, Individual, Status
from darwin_exp.memory import JsonMemory, NoMemory, content_hash, load_library
from darwin_exp.protocols import Lesson, Memory

SCHEMA = Path(__file__).parents[2] / "memory" / "memory.schema.json"


def agent(name: str) -> Individual:
    return Individual(individual_id=name, generation=0, slot=0, genome=Genome(()))


def lesson(
    child: str, parent: str = "base", editor: str = "base", generation: int = 1, **more: Any
) -> Lesson:
    edits = (Edit("rotary", "model.py", "relative positions", {"base": 10_000, "half": True}),)
    known: dict[str, Any] = {"edits": edits, "summary": f"made {child}", "status": Status.OK}
    return Lesson(child, generation, parent, editor, **{**known, **more})


def names(lessons: tuple[Lesson, ...]) -> list[str]:
    return [entry.individual_id for entry in lessons]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# A family: a and b are children of the base; c is a's child edited by b; d is b's, e is c's.
FAMILY = (
    lesson("a", "base", "base", 1, effect=0.1, z_score=1.5),
    lesson("b", "base", "base", 1),
    lesson("x", "base", "base", 1, status=Status.CRASHED, error="RuntimeError: shapes"),
    lesson("c", "a", "b", 2, expected_effect="faster"),
    lesson("d", "b", "b", 2),
    lesson("e", "c", "d", 3, effect=-0.2, z_score=-3.0),
    lesson("f", "d", "d", 3),
)


def remember(memory: JsonMemory, lessons: tuple[Lesson, ...] = FAMILY) -> JsonMemory:
    for entry in lessons:
        memory.learn(entry)
    memory.close_generation()
    return memory


@pytest.fixture(params=["json-lineage", "json-population", "json-library", "off"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> JsonMemory | NoMemory:
    kind, _, scope = request.param.partition("-")
    return NoMemory() if kind == "off" else JsonMemory(tmp_path / "run", scope, capacity=10)


class TestEveryMemory:
    """The contract of the Memory protocol, with generations."""

    def test_it_is_a_memory(self, memory: JsonMemory | NoMemory) -> None:
        part: Memory = memory
        assert part.recall(agent("base"), agent("base")) == ()

    def test_a_generation_under_way_is_told_to_nobody(self, memory: JsonMemory | NoMemory) -> None:
        memory.learn(lesson("a"))
        assert memory.recall(agent("base"), agent("a")) == ()

    def test_neither_is_a_later_one(self, memory: JsonMemory | NoMemory) -> None:
        memory.learn(lesson("a"))
        memory.close_generation()
        before = memory.recall(agent("base"), agent("a"))
        memory.learn(lesson("b", "a", "a", 2))
        memory.learn(lesson("a", effect=9.0))
        assert memory.recall(agent("base"), agent("a")) == before
        memory.close_generation()
        assert len(memory.recall(agent("base"), agent("a"))) == 2 * len(before)

    def test_closing_twice_tells_the_same(self, memory: JsonMemory | NoMemory) -> None:
        memory.learn(lesson("a"))
        memory.close_generation()
        once = memory.recall(agent("base"), agent("a"))
        memory.close_generation()
        assert memory.recall(agent("base"), agent("a")) == once

    def test_no_lesson_is_told_twice(self, memory: JsonMemory | NoMemory) -> None:
        for entry in FAMILY + FAMILY:
            memory.learn(entry)
        memory.close_generation()
        told = names(memory.recall(agent("c"), agent("d")))
        assert len(told) == len(set(told))

    def test_nothing_is_a_problem_at_first(self, memory: JsonMemory | NoMemory) -> None:
        assert memory.problems == []


def test_memory_off_tells_nothing_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    memory = NoMemory()
    memory.learn(lesson("a"))
    memory.close_generation()
    assert memory.recall(agent("base"), agent("a")) == ()
    assert list(tmp_path.iterdir()) == []


def test_child_editor_and_parent_all_learn_the_outcome(tmp_path: Path) -> None:
    memory = remember(JsonMemory(tmp_path, "lineage", 10), (lesson("c", "p", "q"),))
    for name in ("c", "p", "q"):
        assert names(memory.recall(agent(name), agent(name))) == ["c"]
    assert memory.recall(agent("stranger"), agent("stranger")) == ()


def test_a_child_knows_what_its_ancestors_know_and_not_what_its_cousins_know(
    tmp_path: Path,
) -> None:
    cousins = (
        lesson("a", "r", "r", 1),
        lesson("b", "s", "s", 1),
        lesson("a1", "a", "a", 2),
        lesson("b1", "b", "b", 2),
        lesson("a2", "a1", "a1", 3),
    )
    memory = remember(JsonMemory(tmp_path, "lineage", 10), cousins)
    assert names(memory.recall(agent("a2"), agent("a2"))) == ["a", "a1", "a2"]
    assert names(memory.recall(agent("b1"), agent("b1"))) == ["b", "b1"]


def test_a_lineage_is_told_what_editor_and_parent_know_together(tmp_path: Path) -> None:
    cousins = (lesson("a", "r", "r", 1), lesson("b", "s", "s", 1), lesson("c", "t", "t", 1))
    memory = remember(JsonMemory(tmp_path, "lineage", 10), cousins)
    assert names(memory.recall(parent=agent("a"), editor=agent("b"))) == ["a", "b"]


def test_a_failed_attempt_is_remembered_by_those_who_outlive_it(tmp_path: Path) -> None:
    memory = remember(JsonMemory(tmp_path, "lineage", 10))
    [failure] = [e for e in memory.recall(agent("a"), agent("a")) if e.status is Status.CRASHED]
    assert failure.error == "RuntimeError: shapes"


def test_the_population_is_told_everything_in_order(tmp_path: Path) -> None:
    memory = remember(JsonMemory(tmp_path, "population", 10))
    assert memory.recall(agent("nobody"), agent("nobody")) == tuple(
        sorted(FAMILY, key=lambda e: (e.generation, e.individual_id))
    )


def test_the_library_comes_before_what_the_run_learnt(tmp_path: Path) -> None:
    past = (lesson("a", summary="of an earlier run"), lesson("z"))
    told = remember(JsonMemory(tmp_path, "library", 10, past)).recall(agent("a"), agent("a"))
    assert [one.summary for one in told[:2]] == [one.summary for one in past]
    # Another run's `a` is not this one's, and neither are the agents that had a part in it.
    ours = {name for one in FAMILY for name in (one.individual_id, one.parent_id, one.editor_id)}
    for one in told[:2]:
        assert not ours & {one.individual_id, one.parent_id, one.editor_id}
    assert len(told) == 2 + len(FAMILY)
    alone = remember(JsonMemory(tmp_path, "population", 10, past))
    assert len(alone.recall(agent("a"), agent("a"))) == len(FAMILY)


@pytest.mark.parametrize("scope", ["population", "library"])
def test_capacity_leaves_out_the_oldest(tmp_path: Path, scope: str) -> None:
    memory = remember(JsonMemory(tmp_path, scope, 2, (lesson("old"),)))
    assert names(memory.recall(agent("a"), agent("a"))) == ["e", "f"]


def test_a_cycle_of_parents_ends(tmp_path: Path) -> None:
    circle = (lesson("a", "b", "b"), lesson("b", "a", "a"))
    memory = remember(JsonMemory(tmp_path, "lineage", 10), circle)
    assert names(memory.recall(agent("a"), agent("b"))) == ["a", "b"]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_arrival_changes_neither_what_is_told_nor_a_byte_on_disk(
    tmp_path: Path, seed: int
) -> None:
    shuffled = Random(seed).sample(FAMILY, len(FAMILY))
    for scope in ("lineage", "population"):
        first = remember(JsonMemory(tmp_path / "one" / "run", scope, 4))
        second = remember(JsonMemory(tmp_path / "two" / "run", scope, 4), tuple(shuffled))
        assert files_of(tmp_path / "one" / "run") == files_of(tmp_path / "two" / "run")
        for parent in "abcdef":
            for editor in "abcdef":
                told = first.recall(agent(parent), agent(editor))
                assert told == second.recall(agent(parent), agent(editor))


def test_threads_that_learn_at_once_lose_nothing(tmp_path: Path) -> None:
    memory = JsonMemory(tmp_path, "population", 1000)
    lessons = [lesson(f"g1-s{k:02}", "base", f"e{k % 3}") for k in range(48)]
    threads = [
        Thread(target=lambda part=lessons[k::4]: [*map(memory.learn, part)]) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.close_generation()
    assert memory.recall(agent("base"), agent("base")) == tuple(lessons)
    assert len(json.loads((tmp_path / "base.json").read_text())["entries"]) == 48
    assert memory.problems == []


def test_files_lost_or_damaged_are_rebuilt_byte_by_byte(tmp_path: Path) -> None:
    remember(JsonMemory(tmp_path, "lineage", 10))
    before = files_of(tmp_path)
    assert set(before) == {f"{name}.json" for name in ["base", *"abcdefx"]}
    (tmp_path / "a.json").unlink()
    (tmp_path / "b.json").write_bytes(before["b.json"][:40])
    (tmp_path / "c.json").write_text("{}")
    remember(JsonMemory(tmp_path, "lineage", 10))
    assert files_of(tmp_path) == before


def test_the_order_of_parameters_does_not_show(tmp_path: Path) -> None:
    for folder, parameters in (("one", {"a": 1, "b": (2,)}), ("two", {"b": [2], "a": 1})):
        entry = lesson("a", edits=(Edit("o", "f.py", "w", parameters),))
        remember(JsonMemory(tmp_path / folder, "lineage", 10), (entry,))
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_files_are_written_before_the_generation_is_complete(tmp_path: Path) -> None:
    memory = JsonMemory(tmp_path, "lineage", 10)
    memory.learn(lesson("a", "base", "base", effect=0.1))
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["agent"] == "a"
    assert content["inherits"] == "base"
    assert content["entries"][0]["effect"] == 0.1
    assert json.loads((tmp_path / "base.json").read_text())["inherits"] is None


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    edits = (Edit("o", "f.py", "w", {"rate": math.nan}),)
    odd = lesson("a", effect=math.inf, z_score=math.nan, edits=edits)
    assert remember(JsonMemory(tmp_path, "lineage", 10), (odd,)).problems == []
    [entry] = json.loads((tmp_path / "a.json").read_text())["entries"]
    assert entry["effect"] is entry["z_score"] is entry["edits"][0]["parameters"]["rate"] is None


def test_text_that_is_not_unicode_survives_the_way_to_disk_and_back(tmp_path: Path) -> None:
    odd = lesson("a", error="caf\u00e9 \udcff \u2028 \x00")
    assert remember(JsonMemory(tmp_path / "run", "lineage", 10), (odd,)).problems == []
    assert load_library(tmp_path, exclude="") == (odd,)


@contextmanager
def full_disk() -> Iterator[None]:
    """Let every write to a file fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    memory = remember(JsonMemory(tmp_path, "lineage", 10), FAMILY[:2])
    before = files_of(tmp_path)
    with full_disk():
        memory.learn(FAMILY[3])
        memory.learn(FAMILY[3])
        left = files_of(tmp_path)
    assert left == before, "nothing is half-written, and no draft is left"
    assert len(memory.problems) == 3, "one per file, however often it fails"
    assert "memory of a was not written" in memory.problems[0]
    memory.close_generation()
    assert "c" in names(memory.recall(agent("a"), agent("b")))


@pytest.mark.parametrize("name", ["a/b", "nul\0byte", "x" * 300])
def test_a_file_that_cannot_be_written_is_a_problem_and_not_the_end(
    tmp_path: Path, name: str
) -> None:
    memory = remember(JsonMemory(tmp_path, "lineage", 10), (lesson(name, "base", "base"),))
    assert len(memory.problems) == 1
    assert names(memory.recall(agent(name), agent(name))) == [name]


def test_a_folder_that_cannot_be_made_is_a_problem_and_not_the_end(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    memory = remember(JsonMemory(tmp_path / "taken" / "run", "lineage", 10))
    assert memory.problems
    assert names(memory.recall(agent("a"), agent("a"))) != []


@pytest.mark.parametrize(
    ("scope", "capacity", "key"),
    [("everyone", 10, r"memory\.scope"), ("lineage", 0, r"memory\.capacity")],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, scope: str, capacity: int, key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        JsonMemory(tmp_path, scope, capacity)


def test_the_library_returns_what_other_runs_learnt_each_lesson_once(tmp_path: Path) -> None:
    remember(JsonMemory(tmp_path / "run1", "lineage", 10))
    remember(JsonMemory(tmp_path / "run2", "lineage", 10), (lesson("a", summary="again"),))
    remember(JsonMemory(tmp_path / "mine", "lineage", 10), (lesson("own"),))
    ordered = sorted(FAMILY, key=lambda e: (e.generation, e.individual_id))
    assert load_library(tmp_path, exclude="mine") == (*ordered, lesson("a", summary="again"))


def test_a_library_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert load_library(tmp_path / "nowhere", exclude="x") == ()


def edit_entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda c: {**c, "entries": [{**c["entries"][0], **changes}]}


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "not an object": lambda _: [1, 2],
    "no entries": lambda c: {k: v for k, v in c.items() if k != "entries"},
    "another version": lambda c: {**c, "version": 2},
    "an unknown status": edit_entry(status="FINE"),
    "an effect in words": edit_entry(effect="much"),
    "an effect beyond any float": edit_entry(effect=10**400),
    "a generation that is true": edit_entry(generation=True),
    "edits that are a text": edit_entry(edits="rotary"),
    "an edit without a reason": edit_entry(edits=[{"operator": "o", "file": "f"}]),
    "an entry that is null": lambda c: {**c, "entries": [None]},
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_library_file_is_skipped_and_named(tmp_path: Path, kind: str) -> None:
    remember(JsonMemory(tmp_path / "good", "lineage", 10), (lesson("g"),))
    remember(JsonMemory(tmp_path / "bad", "lineage", 10), (lesson("b"),))
    (tmp_path / "bad" / "base.json").unlink()
    path = tmp_path / "bad" / "b.json"
    path.write_text(json.dumps(DAMAGE[kind](json.loads(path.read_text()))))
    problems: list[str] = []
    assert names(load_library(tmp_path, "mine", problems)) == ["g"]
    [problem] = problems
    assert str(path) in problem


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_library_file_that_is_not_json_is_skipped_and_named(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "b.json").write_bytes(content)
    (tmp_path / "bad" / "folder.json").mkdir()
    problems: list[str] = []
    assert load_library(tmp_path, "mine", problems) == ()
    assert len(problems) == 2


def test_the_hash_of_a_library_depends_on_content_and_order_alone() -> None:
    first = content_hash(FAMILY)
    assert first == content_hash(tuple(FAMILY))
    assert len(first) == 64
    assert first != content_hash(FAMILY[::-1])
    assert first != content_hash(FAMILY[1:])
    assert first != content_hash((replace(FAMILY[0], effect=0.11), *FAMILY[1:]))


def test_a_library_keeps_its_hash_over_disk(tmp_path: Path) -> None:
    remember(JsonMemory(tmp_path / "run", "lineage", 10))
    ordered = sorted(FAMILY, key=lambda e: (e.generation, e.individual_id))
    assert content_hash(load_library(tmp_path, "mine")) == content_hash(ordered)


# --- the schema -------------------------------------------------------------------------------


def violations(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> list[str]:
    """Check the JSON Schema keywords that memory.schema.json uses; refuse any other."""
    ignored = {"$schema", "title", "description", "$defs"}
    found: list[str] = []
    # The type first: the other keywords take it for granted.
    for keyword, wanted in sorted(schema.items(), key=lambda pair: pair[0] != "type"):
        if keyword == "$ref":
            found += violations(root["$defs"][wanted.removeprefix("#/$defs/")], value, root)
        elif keyword == "type":
            wanted = wanted if isinstance(wanted, list) else [wanted]
            if not any(is_a(kind, value) for kind in wanted):
                return [f"{value!r} is not {wanted}"]
        elif keyword == "properties":
            for name in wanted.keys() & value.keys():
                found += violations(wanted[name], value[name], root)
        elif keyword == "additionalProperties":
            assert wanted is False
            found += [f"{name} is unknown" for name in value.keys() - schema["properties"].keys()]
        elif keyword == "required":
            found += [f"{name} is missing" for name in wanted if name not in value]
        elif keyword == "items":
            found += [each for item in value for each in violations(wanted, item, root)]
        elif keyword in ("const", "enum"):
            if value not in (wanted if keyword == "enum" else [wanted]):
                found.append(f"{value!r} is not {wanted}")
        elif keyword == "minimum":
            found += [] if value >= wanted else [f"{value} < {wanted}"]
        elif keyword == "minLength":
            found += [] if len(value) >= wanted else [f"{value!r} is too short"]
        else:
            assert keyword in ignored, f"this check does not know {keyword}"
    return found


def is_a(kind: str, value: Any) -> bool:
    types: dict[str, type] = {"object": dict, "array": list, "string": str, "null": type(None)}
    if kind in types:
        return isinstance(value, types[kind])
    number = int if kind == "integer" else (int, float)
    return isinstance(value, number) and not isinstance(value, bool)


def test_every_file_follows_the_schema(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    every_status = tuple(lesson(f"s-{status.value}", status=status) for status in Status)
    remember(JsonMemory(tmp_path, "lineage", 10), FAMILY + every_status)
    contents = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert len(contents) == 8 + len(Status)
    assert [violations(schema, content, schema) for content in contents] == [[]] * len(contents)


@pytest.mark.parametrize("kind", sorted(DAMAGE.keys() - {"an effect beyond any float"}))
def test_the_schema_refuses_what_the_reader_refuses(tmp_path: Path, kind: str) -> None:
    schema = json.loads(SCHEMA.read_text())
    remember(JsonMemory(tmp_path, "lineage", 10), (lesson("b"),))
    content = json.loads((tmp_path / "b.json").read_text())
    assert violations(schema, content, schema) == []
    assert violations(schema, DAMAGE[kind](content), schema)


def test_the_example_in_the_readme_follows_the_schema() -> None:
    schema = json.loads(SCHEMA.read_text())
    text = (SCHEMA.parent / "README.md").read_text(encoding="utf-8")
    example = json.loads(text.split("```json")[1].split("```")[0])
    assert violations(schema, example, schema) == []
