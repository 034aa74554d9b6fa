"""A tiny run's champion as strangers use it: trained by hand, evolved further, taken apart."""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.ablate.__main__ import main
from darwin_exp.ablate.surroundings import prepare
from darwin_exp.champion import leave_champion
from darwin_exp.chronicle import Chronicle
from darwin_exp.individual import Genome
from darwin_exp.journal import Journal, load
from darwin_exp.parts import build_specs

pytestmark = pytest.mark.slow

TRAINER = Path(__file__).parents[2] / "trainer_base"
TINY = [
    "dataset=textdir",
    "dataset.dedup_blocks=false",
    "trainer.context_length=16",
    "trainer.settings.n_layers=1",
    "trainer.settings.n_heads=2",
    "trainer.settings.width=32",
    "trainer.settings.batch_size=4",
    "trainer.settings.learning_rate=1e-5",
    "population_size=2",
    "n_survivors=1",
    "n_generations=0",
    "max_steps=20",
    "workers=1",
    "budget_seconds=60",
    "base.n_repeats=1",
    "promotion.n_seeds=2",
    "eval.n_prefixes=32",
    "integrity.key=00ff",
    "sandbox=process",
    "sandbox.allow_untrusted=true",
    "tracking=none",
    "show=plain",
    "mutator=scripted",
]
# Hunks: a name that the third needs; one without effect; one that helps a lot; and one that wastes
# half of the training.
CHANGES = [
    ("import numpy as np\n", "import numpy as np\n\nMORE = 300\n"),
    ("tokens = read_tokens()\n", "tokens = read_tokens()\nunused = 1\n"),
    ("    return lowest + 0.5 *", "    return MORE * lowest + MORE * 0.5 *"),
    ("    optimizer.step()\n", "    if step % 2:\n        optimizer.step()\n"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text, a script that plays CHANGES, and runs without MFU."""
    place = tmp_path_factory.mktemp("ablation")
    rng = random.Random(0)
    often = [60, *[6] * 7]  # of "a", so that there is much to learn in a few steps
    words = ["".join(rng.choices("abcdefgh", often, k=rng.randint(2, 6))) for _ in range(60)]
    (place / "text.txt").write_text(" ".join(rng.choices(words, k=12_000)))
    code = (TRAINER / "train.py").read_text()
    for before, after in CHANGES:
        assert code.count(before) == 1
        code = code.replace(before, after)
    _play(place, {"file": "train.py", "text": code})
    (place / "runs").mkdir()
    (place / "runs" / ".peaks").write_text("no folder, so that no peak is measured")
    return place


def _play(place: Path, step: dict[str, str]) -> None:
    (place / "script.yaml").write_text(json.dumps([step]))


@pytest.fixture(scope="module")
def run_folder(place: Path) -> Path:
    """Return the folder of a run whose champion differs from the base by four hunks."""
    folders = [f"paths.{name}={place / name}" for name in ("runs", "data", "memory")]
    files = [f"dataset.path={place / 'text.txt'}", f"mutator.file={place / 'script.yaml'}"]
    _succeed([sys.executable, "-m", "darwin_exp", *TINY, *folders, *files], place)
    return (place / "runs" / "latest").resolve()


def _succeed(command: list[str], place: Path) -> str:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _leave_champion_again(folder: Path) -> None:
    chronicle = Chronicle.read(folder)
    workshop = prepare(folder, chronicle, print)
    summary = json.loads((folder / "summary.json").read_text())
    training = build_specs(workshop.config, None)[0]
    leave_champion(folder, chronicle, summary, workshop.data, training)


def test_the_chronicle_rebuilds_everybodys_code(run_folder: Path) -> None:
    chronicle = Chronicle.read(run_folder)
    assert len(chronicle.agents) == 2
    for agent in chronicle.agents:
        assert chronicle.genome_of(agent.individual_id).id == agent.genome_id
    assert chronicle.selected is not None
    assert chronicle.selected.individual_id == "g00-i01"
    assert chronicle.status == "finished"


def test_a_stranger_trains_the_champion_and_it_stays_the_same_genome(run_folder: Path) -> None:
    folder = run_folder / "champion"
    chronicle = Chronicle.read(run_folder)
    champion = chronicle.genome_of("g00-i01")
    assert Genome.from_folder(folder) == champion
    job = json.loads((folder / "job.json").read_text())
    assert (job["max_steps"], job["context_length"]) == (20, 16)
    searched = next(event for event in chronicle.of_kind("job") if event.key == "g00-i01/0")
    assert job["seed"] == searched.payload["seed"]
    (folder / "out").rmdir()  # made again by the trainer
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "train.py", "job.json"], cwd=folder, env=environment, check=True
    )
    weights = (folder / "out" / "model.safetensors").read_bytes()
    assert Genome.from_folder(folder) == champion
    _leave_champion_again(run_folder)
    assert (folder / "out" / "model.safetensors").read_bytes() == weights, "left again, kept"


def test_the_readme_tells_how_to_evolve_the_champion_further(run_folder: Path, place: Path) -> None:
    readme = (run_folder / "champion" / "README.md").read_text()
    (command,) = [line for line in readme.splitlines() if line.startswith("python -m darwin_exp ")]
    typed = shlex.split(command)
    assert f"genome.dir={run_folder / 'champion'}" in typed
    _play(place, {"file": "train.py", "search": "unused = 1", "replace": "unused = 2"})
    process = subprocess.Popen([sys.executable, *typed[1:]], cwd=place)
    try:
        latest = place / "runs" / "latest"
        deadline = time.monotonic() + 240
        while latest.resolve() == run_folder or not _finished(latest, "g00-i01"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait(timeout=60)
    next_run = Chronicle.read(place / "runs" / "latest")
    assert next_run.base_genome == Chronicle.read(run_folder).genome_of("g00-i01")
    child = next_run.genome_of("g00-i01").as_dict["train.py"]
    assert "unused = 2" in child
    assert next_run.status == "interrupted"


def _finished(folder: Path, individual_id: str) -> bool:
    try:
        agent = Chronicle.read(folder).agent(individual_id)
    except Exception:  # not there yet
        return False
    return agent is not None and agent.is_ok


def _jobs(folder: Path) -> dict[str, Any]:
    try:
        return {event.key: event for event in load(folder) if event.kind == "job"}
    except Exception:  # not there yet
        return {}


@pytest.fixture
def start(run_folder: Path, place: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start an ablation; what is left of it is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "darwin_exp.ablate", str(run_folder), *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def _wait_for(folder: Path, n: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 240
    while len(_jobs(folder)) < n:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _gone(run_folder: Path, seconds: float = 15) -> bool:
    """Tell whether no process is left that names the run or works below it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes().decode()
                working_folder = os.readlink(entry / "cwd")
            except OSError:
                continue
            if str(run_folder) in line or working_folder.startswith(str(run_folder)):
                alive.append(line)
        if not alive:
            return True
        time.sleep(0.1)
    return False


def test_an_ablation_interrupted_and_killed_goes_on_and_names_what_pays(
    run_folder: Path, start: Callable[..., "subprocess.Popen[str]"]
) -> None:
    folder = run_folder / "ablation"
    process = start("2", "--drop")
    _wait_for(folder, 1, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert _gone(run_folder)

    process = start()  # as many seeds as were asked for
    _wait_for(folder, 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert _gone(run_folder)
    before = _jobs(folder)

    said = _done(start())
    assert len(before) >= 3
    assert {key: _jobs(folder)[key] for key in before} == before, "nothing is trained twice"
    assert "With --drop the same command" in said
    assert json.loads((folder / "summary.json").read_text())["pruned"] is None, "asked for anew"
    _done(start("--drop"))
    after = _jobs(folder)
    search = {event.payload["seed"] for event in Chronicle.read(run_folder).of_kind("job")}
    seeds = [event.payload["seed"] for event in after.values()]
    assert len(set(seeds)) == len(seeds)
    assert not search & set(seeds)
    assert {event.payload["split"] for event in after.values()} == {"gate"}

    told = json.loads((folder / "summary.json").read_text())
    assert set(told) == {
        *("run_id", "champion_id", "fitness", "n_seeds", "split", "base", "champion", "parts"),
        "pruned",
    }
    assert (told["run_id"], told["champion_id"]) == (run_folder.name, "g00-i01")
    assert (told["base"]["n"], told["champion"]["n"], told["n_seeds"]) == (2, 2, 2)
    assert told["champion"]["perplexity"] < told["base"]["perplexity"]
    parts = {part["name"]: part for part in told["parts"]}
    assert all(
        set(part)
        == {
            *("name", "what", "file", "kind", "n", "perplexity", "contribution_percent", "ci95"),
            *("p_value", "verdict", "note"),
        }
        for part in told["parts"]
    )
    needed, idle, useful, wasteful = (parts[f"train.py hunk {k}"] for k in (1, 2, 3, 4))
    assert needed["verdict"] == "fails"
    assert "MORE" in needed["note"]
    assert (useful["verdict"], useful["kind"]) == ("pays", "hunk")
    assert useful["contribution_percent"] > 5
    assert idle["verdict"] == "unclear"
    assert wasteful["contribution_percent"] < 0
    for what in ("without-2", "train.py hunk 3", "fails", "pays"):
        assert what in said

    _check_pruned(run_folder, told)


def _done(process: "subprocess.Popen[str]") -> str:
    """Wait for an ablation that gets to its end, and return what it said."""
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def _check_pruned(run_folder: Path, told: dict[str, Any]) -> None:
    """Check that what came out no worse was dropped, and nothing else."""
    worthless = {
        part["name"]
        for part in told["parts"]
        if part["verdict"] in ("costs", "unclear") and part["contribution_percent"] <= 0
    }
    assert "train.py hunk 4" in worthless  # the one without effect may be too, as chance has it
    assert set(told["pruned"]) == {"dropped", "perplexity", "n", "percent_vs_champion", "ci95"}
    assert set(told["pruned"]["dropped"]) == worthless
    assert told["pruned"]["n"] == 2
    folder = run_folder / "ablation" / "pruned"
    copy = run_folder / "ablation" / "copy"
    Chronicle.read(run_folder).base_genome.write_to(copy)
    patch = folder / "champion.patch"
    subprocess.run(["patch", "-p1", "-s", "-i", str(patch)], cwd=copy, check=True)
    pruned = Genome.from_folder(copy)
    assert pruned == Genome.from_folder(folder)
    assert "MORE * lowest" in pruned.as_dict["train.py"]
    assert "if step % 2" not in pruned.as_dict["train.py"]
    assert told["pruned"]["percent_vs_champion"] > 0


# --- what is refused, each with one line and 2 ----------------------------------------------------


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def _copy_with(
    run_folder: Path, target: Path, change: Callable[[str, dict[str, Any]], bool]
) -> Path:
    """Copy a run with a journal of its own, whose events `change` alters or (False) leaves out."""
    target.mkdir()
    shutil.copy(run_folder / "config.yaml", target)
    journal = Journal(target)
    for event in load(run_folder):
        payload = json.loads(json.dumps(event.payload))
        if change(event.kind, payload):
            journal.append(event.kind, event.key, payload, event.measured)
    journal.close()
    return target


def test_an_unknown_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(["nowhere", "--runs", str(tmp_path)], capsys)
    assert "nowhere: no such run" in line


def test_a_run_that_was_not_finished_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = _copy_with(run_folder, tmp_path / "copy", lambda kind, _: kind != "claim")
    assert "has no champion" in _refused([str(copy)], capsys)


def test_a_champion_that_is_the_base_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def select_base(kind: str, payload: dict[str, Any]) -> bool:
        if kind == "claim":
            payload["selected_id"] = payload["baseline_id"]
        return True

    copy = _copy_with(run_folder, tmp_path / "copy", select_base)
    assert "champion is the base" in _refused([str(copy)], capsys)


@pytest.mark.parametrize("option", ["--drop", "--drop-unclear"])
def test_dropping_by_perplexity_is_refused_where_fitness_is_another(
    run_folder: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def weigh(kind: str, payload: dict[str, Any]) -> bool:
        if kind == "run":
            payload["config"]["fitness.name"] = "mfu"
        return True

    copy = _copy_with(run_folder, tmp_path / "copy", weigh)
    line = _refused([str(copy), option], capsys)
    assert "its fitness is mfu and an ablation measures perplexity only" in line
    assert not (copy / "ablation").exists()


@pytest.mark.parametrize(("name", "value"), [("data", "other"), ("scorer", "other")])
def test_other_surroundings_are_refused_by_name(
    run_folder: Path, tmp_path: Path, name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def move(kind: str, payload: dict[str, Any]) -> bool:
        if kind == "run":
            payload["environment"][name] = value
        return True

    copy = _copy_with(run_folder, tmp_path / "copy", move)
    assert f"{name}='other'" in _refused([str(copy)], capsys)
    assert not (copy / "ablation").exists()


def test_a_configuration_that_was_touched_is_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = _copy_with(run_folder, tmp_path / "copy", lambda _, __: True)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("max_steps: 20", "max_steps: 21"))
    assert "max_steps is 21" in _refused([str(copy)], capsys)


def test_two_ablations_of_one_run_do_not_meet(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = _copy_with(run_folder, tmp_path / "copy", lambda _, __: True)
    (copy / "ablation").mkdir()
    other = Journal(copy / "ablation")
    try:
        line = _refused([str(copy)], capsys)
    finally:
        other.close()
    assert "copy: its ablation is being run by another process" in line
