"""Sweeps: what their files ask for, in which order, and what goes on after an interruption."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from darwin_exp import config as configs
from darwin_exp import launching, sweep
from darwin_exp.chronicle import Chronicle
from darwin_exp.config import PROJECT, ConfigError
from darwin_exp.guidance import help_text, variants
from darwin_exp.schema import DarwinConfig
from darwin_exp.sweep import Plan, Sweep
from tests.sweeps.command_line import FILES, Begin, ended, sweep_in


@pytest.fixture(autouse=True)
def _composing() -> None:
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT), replace=True)
    configs.register()


@functools.cache  # half a second each
def _compose(*overrides: str) -> DarwinConfig:
    with initialize_config_dir(str(configs.CONF), version_base="1.3"):
        return configs.typed(compose("config", overrides=list(overrides)))


def _params(name: str) -> dict[str, Any]:
    told = yaml.safe_load((PROJECT / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert told["hydra"]["mode"] == "MULTIRUN"
    params: dict[str, Any] = told["hydra"]["sweeper"]["params"]
    return params


def _jobs(name: str, *typed: str) -> list[list[str]]:
    """Return the overrides of every job of a sweep file, as Hydra hands them out."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    in_order = launching.arrange(["+experiment=baseline", *typed], _params(name))
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(in_order), None)
    return [list(job) for job in jobs]


@pytest.mark.parametrize("name", FILES)
def test_every_sweep_file_composes_to_the_jobs_it_promises(name: str) -> None:
    key, settings, n_seeds = FILES[name]
    jobs = _jobs(name)
    asked = Counter(
        (told[key], int(told["seed"]))
        for told in (dict(one.split("=", 1) for one in job) for job in jobs)
    )
    assert asked == {(one, seed): 1 for one in settings for seed in range(n_seeds)}
    # Composing takes its time, and seeds differ in one number: one of them stands for all.
    composed = [_compose(*job) for job in jobs if "seed=1" in job]
    assert {(config.seed, config.experiment) for config in composed} == {(1, "baseline")}
    different = {json.dumps([(k, str(v)) for k, v, _ in configs.leaves(c)]) for c in composed}
    assert len(different) == len(settings), "two settings are the same run"


@pytest.mark.parametrize("name", FILES)
def test_a_sweep_file_opens_with_the_command_that_runs_it(name: str) -> None:
    first, second, *_ = (PROJECT / "sweeps" / f"{name}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    assert second == f"# python -m darwin_exp -cd . +experiment=baseline +sweeps={name}"
    assert second.removeprefix("# ") in help_text()


def test_there_is_a_test_of_every_sweep_file() -> None:
    assert set(variants("sweeps")) == set(FILES)


@pytest.mark.parametrize("name", variants("population"))
def test_every_population_asks_for_the_same_number_of_rewrites(name: str) -> None:
    config = _compose("+experiment=baseline", f"+population={name}", "seed=1")
    n_offspring = config.population_size - config.n_survivors
    assert config.population_size - 1 + config.n_generations * n_offspring == 23
    assert variants("population")[name] in help_text()
    assert len(variants("population")[name]) > 10


def test_what_was_typed_wins_over_the_sweep_file_and_both_over_the_recipe() -> None:
    assert len(_jobs("memory", "seed=0,1")) == 4
    assert {"memory=off" in job for job in _jobs("memory", "memory=off")} == {True}
    assert len(_jobs("memory", "memory=off")) == 5
    jobs = [job for job in _jobs("population") if "seed=1" in job]
    sizes = [_compose(*job).population_size for job in jobs]
    assert sizes == [4, 8, 16, 24]
    tiny = _jobs("population", "+debug=tiny", "seed=0")[-1]
    assert _compose(*tiny).population_size == 3


def test_a_job_is_the_same_with_other_operational_keys_unless_they_are_varied() -> None:
    job = ["+experiment=baseline", "+sweeps=memory", "memory=off", "seed=1"]
    more = [*reversed(job), "workers=1", "tracking=none", "paths.runs=x", "sweep=latest"]
    assert launching.job_of(job, ["memory"]) == launching.job_of(more, ["memory"])
    assert launching.job_of(job, []) != launching.job_of([*job, "max_steps=3"], [])
    longer = launching.job_of([*job, "n_generations=1"], ["n_generations"])
    assert longer != launching.job_of([*job, "n_generations=2"], ["n_generations"])


# --- a sweep's folder ----------------------------------------------------------------------------


def _plan(*jobs: str) -> Plan:
    return Plan("memory", "python -m darwin_exp", tuple(frozenset(j.split()) for j in jobs), ("m",))


def test_more_jobs_may_join_a_sweep_and_none_may_leave(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "one"
    Sweep(folder, _plan("m=a", "m=b")).close()
    Sweep(folder, _plan("m=c", "m=b", "m=a")).close()
    with pytest.raises(ConfigError, match=r"sweep=one: 1 of its 3 jobs, such as m=c, are not"):
        Sweep(folder, _plan("m=a", "m=b"))
    kept = sweep.read_plan(folder)
    assert kept is not None
    assert len(kept.jobs) == 3


def test_two_processes_cannot_work_at_the_same_sweep(tmp_path: Path) -> None:
    held = Sweep(tmp_path / "one", _plan("m=a"))
    with pytest.raises(ConfigError, match="another process"):
        Sweep(tmp_path / "one", _plan("m=a"))
    held.close()
    Sweep(tmp_path / "one", _plan("m=a")).close()


def test_runs_are_found_again_also_after_the_runs_were_moved(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sweeps" / "one"
    for name in ("r1", "deleted", "r2"):
        sweep.enlist(folder, tmp_path / "runs" / name, "command", frozenset({"m=a"}))
    for name in ("r1", "r2"):
        (tmp_path / "runs" / name).mkdir()
        for needed in ("config.yaml", "journal.sqlite"):
            (tmp_path / "runs" / name / needed).touch()
    with (folder / "runs.jsonl").open("a") as file:
        file.write('{"run_id": "cut o')
    (tmp_path / "runs").rename(tmp_path / "moved")
    found = sweep.members(tmp_path / "moved" / "sweeps" / "one")
    assert [one.run_folder for one in found] == [tmp_path / "moved" / n for n in ("r1", "r2")]


def test_an_unknown_sweep_is_one_line_that_names_the_newest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none yet"):
        sweep.find(tmp_path, "latest")
    Sweep(tmp_path / "sweeps" / "one", _plan("m=a")).close()
    with pytest.raises(ConfigError, match="the newest are one"):
        sweep.find(tmp_path, "nope")
    assert sweep.find(tmp_path, "latest").name == "one"


# --- whole sweeps, from the command line ---------------------------------------------------------


def _until(process: subprocess.Popen[str], there: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _seeds_by(folder: Path, key: str) -> dict[str, list[int]]:
    seeds: dict[str, list[int]] = {}
    for member in sweep.members(folder):
        told = Chronicle.read(member.run_folder)
        seeds.setdefault(str(told.config[key]), []).append(told.config["seed"])
        assert told.status == "finished", told.run_id
    return seeds


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
def test_an_interrupted_sweep_goes_on_and_has_every_run_once(begin: Begin, tmp_path: Path) -> None:
    command = ["-cd", ".", "+experiment=baseline", "+sweeps=memory", "seed=0,1", "+debug=tiny",
               "tracking=mlflow", "n_generations=0"]  # fmt: skip
    process = begin(tmp_path, *command)

    def second_run_is_on_its_way() -> bool:
        folders = list((tmp_path / "runs" / "sweeps").glob("*"))
        runs = sweep.members(folders[0]) if folders else []
        if len(runs) < 2:
            return False
        return any(e.kind == "job" for e in _events_so_far(runs[1].run_folder))

    _until(process, second_run_is_on_its_way)
    process.send_signal(signal.SIGINT)
    code, said = ended(process)
    folder = sweep_in(tmp_path)
    assert code == 130, said
    go_on = f"go on with: python -m darwin_exp -cd . {' '.join(command[2:6])}"
    assert go_on in said
    assert said.rstrip().endswith(f"sweep={folder.name}")
    assert _sweep_run(tmp_path).info.status == "KILLED"
    first, second = sweep.members(folder)

    refused = begin(tmp_path, *[one.replace("0,1", "1") for one in command], "sweep=latest")
    code, said = ended(refused)
    assert code == 2, said
    assert f"sweep={folder.name}: 2 of its 4 jobs, such as memory=json seed=0, are not" in said

    code, said = ended(begin(tmp_path, *command, "sweep=latest", "workers=1"))
    assert code == 0, said
    assert f"job 1 of 4: memory=json seed=0: finished before as {first.run_folder.name}" in said
    assert f"job 2 of 4: memory=json seed=1: going on with {second.run_folder.name}" in said
    assert _seeds_by(folder, "memory.name") == {"json": [0, 1], "off": [0, 1]}
    assert "gain is positive when better" in said

    told = json.loads((folder / "comparison.json").read_text())
    (cohort,) = told["cohorts"]
    found = {s["label"]: (s["n_runs"], s["n_finished"]) for s in cohort["settings"]}
    assert found == {"memory=json": (2, 2), "memory=off": (2, 2)}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")

    parent = _sweep_run(tmp_path)
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == f"memory {folder.name}"
    assert "+sweeps=memory" in parent.data.tags["darwin.command"]
    points = _history(tmp_path)
    assert [step for step, _ in points] == [0, 1, 2]

    code, said = ended(begin(tmp_path, *command, "sweep=latest"))
    assert code == 0
    assert len(sweep.members(folder)) == 4, "a finished sweep has nothing left to do"
    assert _history(tmp_path) == points, "what was published twice is there once"


def _events_so_far(run_folder: Path) -> list[Any]:
    from darwin_exp.journal import JournalError, load

    try:
        return load(run_folder)
    except JournalError:
        return []


def _sweep_run(place: Path) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place / 'runs' / 'mlflow.sqlite'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.`darwin.role` = 'sweep'")
    return run


def _history(place: Path) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place / 'runs' / 'mlflow.sqlite'}")
    run = _sweep_run(place)
    curve = "best_so_far/memory_json/2 runs"  # and a few digits that say of which runs
    (name,) = (name for name in run.data.metrics if name.startswith(curve))
    points = client.get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in points]


@pytest.mark.slow
def test_jobs_that_fail_do_not_end_a_sweep_and_are_tried_again(
    begin: Begin, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.py").write_text("raise RuntimeError('broken base')\n")
    (broken / "model.py").write_text("")
    command = ["-m", "population_size=2", "n_generations=0", "promotion.n_seeds=2",
               "tracking=none", "n_survivors=1,7", f"genome.dir={broken},trainer_base"]  # fmt: skip
    code, said = ended(begin(tmp_path, *command))
    folder = sweep_in(tmp_path)
    assert code == 2, said
    assert "broken base" in said
    assert said.count("n_survivors=7 leaves no room") == 2, "misconfigured jobs have no run"
    states = [Chronicle.read(one.run_folder).status for one in sweep.members(folder)]
    assert states == ["failed", "finished"]
    assert "2 of 4 jobs have no run" in said
    assert f"sweep={folder.name}" in said.splitlines()[-1]

    code, said = ended(begin(tmp_path, *command, "sweep=latest"))
    assert code == 2, said
    assert "going on with" in said
    assert "finished before" in said
    assert len(sweep.members(folder)) == 2


def test_a_mistyped_sweep_leaves_no_folder_and_one_line(begin: Begin, tmp_path: Path) -> None:
    code, said = ended(begin(tmp_path, "-m", "seed=0,1", "budgetseconds=3"))
    assert code == 2
    assert (
        said.strip() == "darwin: budgetseconds: there is no such key; did you mean budget_seconds?"
    )
    assert not list((tmp_path / "runs" / "sweeps").glob("*"))


def test_sweep_without_a_sweep_and_an_unknown_one_are_one_line(
    begin: Begin, tmp_path: Path
) -> None:
    code, said = ended(begin(tmp_path, "sweep=latest"))
    assert code == 2
    assert "this command is no sweep" in said
    code, said = ended(begin(tmp_path, "-m", "seed=0,1", "sweep=nope"))
    assert code == 2
    assert len(said.strip().splitlines()) == 1
    assert "sweep=nope: no such sweep" in said
