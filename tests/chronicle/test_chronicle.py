"""The chronicle says what the journal says, as people ask for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.chronicle import Chronicle
from darwin_exp.individual import Genome
from darwin_exp.journal import Journal, JournalError

FILES = {"train.py": "rate = 1\n", "model.py": "width = 1\n"}


class Diary:
    """Writes the events of a run that never ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder)
        self.journal.append("session", "0", {"what": "started"})

    def begin(self) -> None:
        self.journal.append(
            "run",
            "run",
            {"config": {"seed": 3}, "files": FILES, "environment": {}},
            {"run_id": "r1", "command": "python -m darwin_exp", "sweep_id": None},
        )

    def proposal(self, name: str, attempt: int, parent: str, **payload: Any) -> None:
        told = {"individual_id": name, "parent_id": parent, **payload}
        self.journal.append("proposal", f"{name}/{attempt}", told)

    def individual(self, name: str, parent: str | None = None, **changes: Any) -> None:
        payload = {
            "individual_id": name,
            "generation": int(name[1:3]),
            "slot": int(name[5:7]),
            "parent_ids": [parent] if parent else [],
            "editor_id": parent,
            "edits": [],
            "n_new_edits": 0,
            "summary": "",
            "status": "OK",
            "reason": "none",
            "message": "",
            "metrics": {"val_perplexity": 10.0},
            "fitness": -2.0,
            "genome_id": "?",
            "attempts": 1,
            "repaired": False,
            **changes,
        }
        measured = {"rates": {"mfu": 0.2}, "training_seconds": 1.5, "contended": False}
        self.journal.append("individual", name, payload, measured)

    def read(self) -> Chronicle:
        """Read while the journal is open: the run may be going on."""
        return Chronicle.read(self.folder)


@pytest.fixture
def diary(tmp_path: Path) -> Iterator[Diary]:
    diary = Diary(tmp_path)
    yield diary
    diary.journal.close()


def test_a_run_that_has_not_begun_or_left_no_journal_says_so(diary: Diary, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="had not begun"):
        diary.read()
    with pytest.raises(JournalError, match="no such journal"):
        Chronicle.read(tmp_path / "nowhere")


def test_the_base_comes_first_whenever_it_was_finished(diary: Diary) -> None:
    diary.begin()
    assert diary.read().base is None
    assert diary.read().selected is None
    diary.individual("g00-i01", "g00-i00")
    assert diary.read().base is None, "somebody is there, but not the base"
    diary.individual("g00-i00")
    chronicle = diary.read()
    assert chronicle.base is not None
    assert [agent.individual_id for agent in chronicle.agents] == ["g00-i00", "g00-i01"]
    assert [agent.individual_id for agent in chronicle.rewrites] == ["g00-i01"]


def test_code_is_rebuilt_through_parents_repairs_and_the_stillborn(diary: Diary) -> None:
    diary.begin()
    diary.individual("g00-i00")
    diary.proposal("g00-i01", 0, "g00-i00", changed={"train.py": "rate =\n"}, removed=[])
    diary.proposal("g00-i01", 1, "g00-i00", changed={"train.py": "rate = 2\n"}, removed=[])
    diary.individual("g00-i01", "g00-i00", attempts=2, repaired=True)
    diary.proposal("g01-i00", 0, "g00-i01", reason="no_op", message="nothing fits")
    diary.individual("g01-i00", "g00-i01", status="DUPLICATE", fitness=None)
    more = {"changed": {"extra.py": "x = 1\n"}, "removed": ["model.py"]}
    diary.proposal("g02-i00", 0, "g00-i01", **more)
    diary.proposal("g02-i00", 1, "g00-i01", reason="nothing_to_edit", message="no cure")
    diary.individual("g02-i00", "g00-i01")
    chronicle = diary.read()
    base, mended = Genome.of(FILES), Genome.of({**FILES, "train.py": "rate = 2\n"})
    assert chronicle.base_genome == base
    assert chronicle.genome_of("g00-i00") == base
    assert chronicle.genome_of("g00-i01") == mended
    assert chronicle.genome_of("g01-i00") == mended, "no edit was made: its parent's code"
    assert chronicle.genome_of("g02-i00") == mended.with_files(
        {"extra.py": "x = 1\n"}, removed=["model.py"]
    )
    with pytest.raises(KeyError):
        chronicle.genome_of("g09-i00")


def test_the_fittest_is_selected_until_the_closing_decides(diary: Diary) -> None:
    diary.begin()
    diary.individual("g00-i00", fitness=0.0)
    diary.individual("g00-i01", "g00-i00", fitness=-0.5)
    diary.individual("g00-i02", "g00-i00", status="CRASHED", fitness=None)
    selected = diary.read().selected
    assert selected is not None
    assert selected.individual_id == "g00-i00", "a fitness of 0 is one"
    diary.individual("g01-i00", "g00-i00", fitness=0.25)
    assert diary.read().best_so_far() == [0.0, 0.0, 0.0, 0.25]
    diary.journal.append("claim", "after-g01", {"selected_id": "g00-i01"})
    diary.journal.append("claim", "after-g02", {"selected_id": "g01-i00"})
    chronicle = diary.read()
    assert chronicle.closing is not None
    assert chronicle.closing.key == "after-g02", "the last one counts"
    assert chronicle.selected is not None
    assert chronicle.selected.individual_id == "g01-i00"


def test_a_retimed_rate_replaces_the_searched_one(diary: Diary) -> None:
    diary.begin()
    diary.individual("g00-i00")
    diary.individual("g00-i01", "g00-i00")
    for name, found in (
        ("g00-i00", {"mfu": 0.2, "tokens_per_second": 600.0}),
        ("g00-i00", {"mfu": 0.3, "tokens_per_second": 900.0}),  # an individual's last counts
        ("g00-i01", {"why_none": "g00-i01/retime-long: CRASHED"}),
    ):
        n = len(diary.journal.of_kind("retimed"))
        diary.journal.append("retimed", f"{name}/{n}", {"individual_id": name}, found)
    first, second = diary.read().agents
    assert (first.value("mfu"), first.value("tokens_per_second")) == (0.3, 900.0)
    assert second.value("mfu") == 0.2
    assert second.value("tokens_per_second") is None, "not measured is not 0"
    assert first.value("val_perplexity") == 10.0
    assert first.seconds == {"training": 1.5}


def test_edits_are_told_apart_into_inherited_and_new(diary: Diary) -> None:
    diary.begin()
    edits = [{"operator": name, "file": "model.py", "why": "", "parameters": {}} for name in "abc"]
    diary.individual("g00-i01", "g00-i00", edits=edits, n_new_edits=2)
    diary.individual("g00-i02", "g00-i00", edits=edits, n_new_edits=0)
    some, none = diary.read().agents
    assert [edit.operator for edit in some.edits] == ["a", "b", "c"]
    assert [edit.operator for edit in some.new_edits] == ["b", "c"]
    assert none.new_edits == ()


def test_a_run_is_running_until_its_last_process_said_how_it_ended(diary: Diary) -> None:
    diary.begin()
    assert diary.read().status == "running"
    diary.journal.append("end", "0", {"status": "interrupted"})
    assert diary.read().status == "interrupted"
    diary.journal.append("session", "1", {"what": "resumed"})
    assert diary.read().status == "running"
    diary.journal.append("end", "1", {"status": "finished"})
    assert diary.read().status == "finished"


def test_only_good_trainings_of_the_base_measure_the_noise(diary: Diary) -> None:
    diary.begin()
    for key, purpose, status in (
        ("g00-i00/0", "base_repeat", "OK"),
        ("g00-i00/repeat-1", "base_repeat", "INFRA_LOST"),
        ("g00-i00/repeat-1.1", "base_repeat", "OK"),
        ("g00-i01/0", "search", "OK"),
        ("g00-i00/claim-00-0", "claim", "OK"),
    ):
        diary.journal.append("job", key, {"purpose": purpose, "status": status})
    assert [event.key for event in diary.read().base_repeats] == [
        "g00-i00/0",
        "g00-i00/repeat-1.1",
    ]


def test_a_damaged_journal_is_refused_and_the_event_named(diary: Diary) -> None:
    import sqlite3

    diary.begin()
    diary.journal.close()
    database = sqlite3.connect(diary.folder / "journal.sqlite")
    database.execute("UPDATE events SET payload = replace(payload, 'rate', 'rats')")
    database.commit()
    database.close()
    with pytest.raises(JournalError, match="event 2"):
        diary.read()
