"""The champion's folder says what it is, can be used as it stands, and is never half there."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.champion import job_file, leave_champion, leave_product, next_command
from darwin_exp.chronicle import Chronicle
from darwin_exp.evaluation.job import _launch
from darwin_exp.individual import (
    DataSpec,
    Genome,
    Job,
    Purpose,
    SandboxSpec,
    TrainingSpec,
)
from darwin_exp.protocols import Event

BASE = Genome.of({"train.py": "rate = 1\n", "model.py": "width = 1\n", "settings.json": "{}\n"})
CHILD = BASE.with_files({"train.py": "rate = 2\n", "extra.py": "more = 1\n"}, ["settings.json"])
SUMMARY: dict[str, Any] = {
    "champion": {"individual_id": "g01-i00", "test_perplexity": 9.5, "val_perplexity": 9.25},
    "baseline": {"individual_id": "g00-i00", "test_perplexity": 12.25, "val_perplexity": 12.0},
    "improvement": {
        "perplexity_percent": 22.45,
        "ci95": [18.5, 26.25],
        "p_value": 0.0003,
        "significant": True,
        "equal_steps": None,
    },
}
TRAINING = TrainingSpec(budget_seconds=12.0, max_steps=None, seed=0, context_length=64, threads=2)


def individual(name: str, genome: Genome, **changes: Any) -> Event:
    payload = {
        "individual_id": name,
        "generation": int(name[1:3]),
        "slot": 0,
        "parent_ids": [] if name == "g00-i00" else ["g00-i00"],
        "editor_id": None if name == "g00-i00" else "g00-i00",
        "edits": [],
        "n_new_edits": 0,
        "summary": "",
        "status": "OK",
        "reason": "none",
        "message": "",
        "metrics": {},
        "fitness": 0.0,
        "genome_id": genome.id,
        "attempts": 1,
        "repaired": False,
        **changes,
    }
    return Event(0, "individual", name, payload, {})


@pytest.fixture
def chronicle() -> Chronicle:
    edit = {"operator": "rotary", "file": "model.py", "why": "order", "parameters": {"base": 7}}
    config = {"dataset.name": "textdir", "dataset.path": "/a b/it's", "trainer.context_length": 64}
    events = [
        Event(
            1,
            "run",
            "run",
            {"config": {**config, "experiment": "baseline"}, "files": BASE.as_dict},
            {
                "run_id": "r1",
                "command": "python -m darwin_exp +experiment=baseline seed=3 dataset=textdir "
                "dataset.path=relative.txt genome.dir=elsewhere",
            },
        ),
        individual("g00-i00", BASE),
        Event(
            3,
            "proposal",
            "g01-i00/0",
            {
                "individual_id": "g01-i00",
                "parent_id": "g00-i00",
                "changed": {"train.py": "rate = 2\n", "extra.py": "more = 1\n"},
                "removed": ["settings.json"],
            },
        ),
        Event(
            4,
            "job",
            "g01-i00/0",
            {
                "individual_id": "g01-i00",
                "genome_id": CHILD.id,
                "purpose": "search",
                "status": "OK",
                "seed": 77,
            },
        ),
        individual("g01-i00", CHILD, edits=[edit], n_new_edits=1, fitness=1.0),
        Event(6, "claim", "after-g01", {"selected_id": "g01-i00"}),
    ]
    return Chronicle.of(events)


@pytest.fixture
def data(tmp_path: Path) -> DataSpec:
    return DataSpec(tmp_path / "data", "hash", 84)


def leave(run: Path, chronicle: Chronicle, data: DataSpec, **changes: Any) -> Path:
    run.mkdir(exist_ok=True)
    leave_champion(run, chronicle, {**SUMMARY, **changes}, data, TRAINING)
    return run / "champion"


def test_the_folder_is_the_champions_genome_with_its_patch_and_a_job(
    chronicle: Chronicle, data: DataSpec, tmp_path: Path
) -> None:
    folder = leave(tmp_path / "r1", chronicle, data)
    assert Genome.from_folder(folder) == CHILD
    assert (folder / "champion.patch").read_text() == CHILD.patch_from(BASE)
    assert (folder / "out").is_dir()
    job = json.loads((folder / "job.json").read_text())
    assert (job["budget_seconds"], job["threads"], job["vocab_size"]) == (12.0, 2, 84)
    assert job["seed"] == 77, "the seed that the champion was found with"
    assert Path(job["train"]) == data.folder / "train.bin"
    assert [path.name for path in folder.parent.iterdir()] == ["champion"]


def test_a_job_file_holds_what_the_harness_tells_a_candidate(
    data: DataSpec, tmp_path: Path
) -> None:
    """The two are written in two places, and must not drift apart."""
    job = Job(
        job_id="j",
        individual_id="i",
        purpose=Purpose.SEARCH,
        genome=BASE,
        data=data,
        training=replace(TRAINING, seed=5),
        sandbox=SandboxSpec("process"),
        evaluation=None,
        secret=b"",
        folder=tmp_path,
    )
    told = dict(_launch(job).job)
    ours = job_file(data, TRAINING, seed=5)
    assert ours.keys() == told.keys()
    assert {**ours, "train": None} == {**told, "train": None}


def test_the_readme_says_what_was_measured_and_what_was_not(
    chronicle: Chronicle, data: DataSpec, tmp_path: Path
) -> None:
    readme = (leave(tmp_path / "r1", chronicle, data) / "README.md").read_text()
    assert "test perplexity 22.45 % lower" in readme
    assert "+18.50 to +26.25 %" in readme
    assert "significant." in readme
    assert "At equal steps: not measured." in readme
    assert "| test perplexity | 12.25 | 9.500 |" in readme
    assert "| MFU | - | - |" in readme
    assert "- `rotary` in `model.py` (base 7): order" in readme
    assert "python -m darwin_exp.ablate" in readme


def test_the_readme_says_plainly_that_nothing_was_gained(
    chronicle: Chronicle, data: DataSpec, tmp_path: Path
) -> None:
    noise = {**SUMMARY["improvement"], "significant": False, "p_value": 0.4, "ci95": [-3.0, 5.0]}
    readme = (leave(tmp_path / "r1", chronicle, data, improvement=noise) / "README.md").read_text()
    assert "no significant progress" in readme
    base = {**SUMMARY["champion"], "individual_id": "g00-i00"}
    why = {"perplexity_percent": None, "why_none": "no individual was better than the base"}
    folder = leave(tmp_path / "r2", chronicle, data, champion=base, improvement=why)
    assert "It is the base itself" in (folder / "README.md").read_text()
    assert "no individual was better" in (folder / "README.md").read_text()
    assert (folder / "champion.patch").read_text() == ""


def test_the_next_run_is_typed_like_the_last_with_another_base(chronicle: Chronicle) -> None:
    typed = shlex.split(next_command(chronicle, Path("/runs/r1/champion")))
    assert typed[:5] == ["python", "-m", "darwin_exp", "+experiment=baseline", "seed=3"]
    assert sorted(typed[5:]) == [
        "dataset.path='/a b/it\\'s'",
        "dataset=textdir",
        "genome.dir=/runs/r1/champion",
        "trainer.context_length=64",
    ]


def test_hydra_reads_the_quoted_path_back(chronicle: Chronicle) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = shlex.split(next_command(chronicle, Path("/x")))[3:]
    read = {
        override.key_or_group: override.value()
        for override in OverridesParser.create().parse_overrides(typed)
    }
    assert read["dataset.path"] == "/a b/it's"


def test_a_run_without_a_champion_leaves_none(
    chronicle: Chronicle, data: DataSpec, tmp_path: Path
) -> None:
    assert not leave(tmp_path / "r1", chronicle, data, champion=None).exists()


def product(folder: Path, genome: Genome) -> None:
    leave_product(folder, genome, BASE, {"seed": 1}, "read me\n")


def test_another_champion_replaces_the_folder_and_keeps_what_was_trained(tmp_path: Path) -> None:
    folder = tmp_path / "champion"
    product(folder, BASE)
    product(folder, CHILD)
    assert Genome.from_folder(folder) == CHILD
    assert not (folder / "settings.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["champion"]

    (folder / "out" / "model.safetensors").write_text("hours of work")
    product(folder, CHILD)
    assert (folder / "out" / "model.safetensors").read_text() == "hours of work"
    product(folder, BASE)
    assert Genome.from_folder(folder) == BASE
    kept = tmp_path / f"champion-{CHILD.id[:8]}"
    assert (kept / "out" / "model.safetensors").read_text() == "hours of work"


@pytest.mark.parametrize("fails_at", range(6))
def test_a_crash_while_it_is_written_leaves_the_old_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    from darwin_exp import champion

    folder = tmp_path / "champion"
    product(folder, BASE)
    before = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    write, calls = champion._write, []

    def crash(path: Path, text: str) -> Path:
        calls.append(path)
        if len(calls) > fails_at:
            raise OSError("no space left")
        return write(path, text)

    monkeypatch.setattr(champion, "_write", crash)
    with pytest.raises(OSError, match="no space"):
        product(folder, CHILD)
    assert {path: path.read_text() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    product(folder, CHILD)
    assert Genome.from_folder(folder) == CHILD
    assert [path.name for path in tmp_path.iterdir()] == ["champion"]


def trained(folder: Path) -> Path:
    """Leave a model as a training by hand does."""
    model = folder / "out" / "model.safetensors"
    model.write_text("hours of work")
    return model


def test_what_was_trained_beside_a_file_that_is_no_text_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "champion"
    product(folder, CHILD)
    (folder / "notes.txt").write_bytes(b"\xff\xfe\x00")
    trained(folder)
    product(folder, BASE)
    assert Genome.from_folder(folder) == BASE
    assert (tmp_path / "champion-kept" / "out" / "model.safetensors").is_file()
    assert (tmp_path / "champion-kept" / "notes.txt").is_file()


def test_no_folder_that_was_kept_before_is_replaced(tmp_path: Path) -> None:
    folder, name = tmp_path / "champion", f"champion-{CHILD.id[:8]}"
    for work in ("first", "second", "third"):
        product(folder, CHILD)
        trained(folder).write_text(work)
        product(folder, BASE)
    for number, work in (("", "first"), ("-2", "second"), ("-3", "third")):
        assert (tmp_path / (name + number) / "out" / "model.safetensors").read_text() == work


@pytest.mark.parametrize("touched", ["train.py", "new.py", "plot.png", "champion.patch"])
def test_a_folder_that_somebody_edited_is_kept_though_nothing_was_trained(
    tmp_path: Path, touched: str
) -> None:
    folder = tmp_path / "champion"
    product(folder, CHILD)
    (folder / touched).write_text("mine = 1\n")
    product(folder, BASE)
    assert Genome.from_folder(folder) == BASE
    (kept,) = (path for path in tmp_path.iterdir() if path != folder)
    assert (kept / touched).read_text() == "mine = 1\n"
