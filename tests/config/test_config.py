"""What is typed at the door: every recipe composes, and every mistake is one clear line."""

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from darwin_exp import __main__ as command_line
from darwin_exp import config as configs
from darwin_exp import schema
from darwin_exp.config import ConfigError
from darwin_exp.guidance import variants
from darwin_exp.schema import DarwinConfig


@pytest.fixture(autouse=True)
def _composing() -> None:
    OmegaConf.register_new_resolver("project_root", lambda: str(configs.PROJECT), replace=True)
    configs.register()


def _compose(*overrides: str) -> DarwinConfig:
    with initialize_config_dir(str(configs.CONF), version_base="1.3"):
        return configs.typed(compose("config", overrides=list(overrides)))


NEEDS = {"scripted": ["mutator.file=edits.yaml"]}
VARIANTS = [(group, name) for group in schema.GROUPS for name in variants(group)]
RECIPES = [(f"+{kind}={name}",) for kind in ("experiment", "debug") for name in variants(kind)]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe[0])
def test_every_recipe_composes_alone_and_with_debug_tiny(recipe: tuple[str, ...]) -> None:
    assert _compose(*recipe).population_size >= 2
    if "debug" not in recipe[0]:
        assert _compose(*recipe, "+debug=tiny").population_size == 3


@pytest.mark.parametrize(("group", "name"), VARIANTS, ids=lambda value: str(value))
def test_every_variant_composes_into_its_own_schema(group: str, name: str) -> None:
    config = _compose(f"{group}={name}", *NEEDS.get(name, []))
    assert isinstance(getattr(config, group), configs.schema_of(group, name))


@pytest.mark.parametrize(("group", "name"), VARIANTS, ids=lambda value: str(value))
def test_every_variant_is_read_back_as_it_was_written_down(
    group: str, name: str, tmp_path: Path
) -> None:
    """Otherwise no run that was started with it could be resumed."""
    config = _compose(f"{group}={name}", *NEEDS.get(name, []))
    path = tmp_path / "config.yaml"
    path.write_text(configs.as_yaml(config))
    again = configs.from_yaml(path, [], {})
    assert list(configs.leaves(again)) == list(configs.leaves(config))


@pytest.mark.parametrize("group", [*schema.GROUPS, "experiment", "debug"])
def test_every_file_of_conf_says_in_its_first_line_what_it_is_for(group: str) -> None:
    assert variants(group)
    for name, first in variants(group).items():
        assert len(first) > 10, f"{group}/{name}"
        if group == "experiment":
            assert first == f"python -m darwin_exp +experiment={name}"


def test_a_control_without_edits_replicates_duplicates() -> None:
    assert _compose("mutator=none").dedup is schema.Dedup.replicate
    assert _compose("mutator=none", "dedup=reject").dedup is schema.Dedup.reject


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


MISTAKES = {
    "unknown key": (["budgetseconds=3"], "budgetseconds", "did you mean budget_seconds"),
    "unknown nested key": (["eval.n_prefix=3"], "eval.n_prefix", "did you mean eval.n_prefixes"),
    "unknown group": (["selector=tournament"], "selector", "selection"),
    "unknown variant": (["selection=best"], "selection=best", "truncation"),
    "unknown recipe": (["+experiment=nope"], "experiment=nope", "baseline"),
    "wrong type": (["population_size=many"], "population_size", "Integer"),
    "wrong choice": (["dedup=maybe"], "dedup", "replicate"),
    "no value": (["seed"], "seed", "key=value"),
    "missing value": (["mutator=scripted"], "mutator.file", "mutator.file=VALUE"),
    "no room for offspring": (["n_survivors=9"], "n_survivors=9", "population_size=8"),
    "no survivors": (["n_survivors=0"], "n_survivors=0", "at least 1"),
    "budget 0": (["budget_seconds=0"], "budget_seconds=0", "greater than 0"),
    "endless budget": (["budget_seconds=inf"], "budget_seconds=inf", "greater than 0"),
    "workers 0": (["workers=0"], "workers=0", "at least 1"),
    "too many workers": (["workers=4096"], "workers=4096", "use workers="),
    "no steps": (["max_steps=0"], "max_steps=0", "at least 1"),
    "elitism": (["selection.elitism=4"], "selection.elitism=4", "n_survivors=3"),
    "edits per child": (["mutator.edits_per_child=[2,1]"], "mutator.edits_per_child", "[1,2]"),
    "splits": (["dataset.splits=[0.5,0.5]"], "dataset.splits", "sum to 1"),
    "no validation": (["dataset.splits=[1,0,0,0]"], "dataset.splits", "must not be empty"),
    "key of the scorer": (["integrity.key=xyz"], "integrity.key", "hexadecimal"),
    "device": (["sandbox.device=tpu"], "sandbox.device=tpu", "cpu or cuda"),
    "no objectives": (["selection=nsga2", "selection.objectives=[]"], "objectives", "mfu"),
    "mistyped objective": (
        ["selection=nsga2", "selection.objectives=[val_preplexity]"],
        "val_preplexity",
        "val_perplexity",
    ),
    "memory of nothing": (["memory.capacity=0"], "memory.capacity=0", "at least 1"),
    "weights": (
        ["fitness=weighted", "fitness.perplexity_weight=0", "fitness.mfu_weight=0"],
        "fitness",
        "above 0",
    ),
    "candidates as root": (["sandbox.uid=0"], "sandbox.uid=0", "at least 1"),
    "no text": (["dataset=textdir", "dataset.path=nowhere.txt"], "nowhere.txt", "dataset.path"),
    "no genome": (["genome.dir=nowhere"], "genome.dir", "nowhere"),
    "unknown run": (["resume=nope"], "resume=nope", "no such run"),
    "script": (["mutator=scripted", "mutator.file=nowhere.yaml"], "mutator.file", "nowhere.yaml"),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda name: name.replace(" ", "_"))
def test_a_mistake_is_one_line_that_names_the_key_and_the_cure(
    mistake: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides, key, cure = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    code, line = _run([*overrides, f"paths.runs={runs}"], monkeypatch, capsys)
    assert code == 2
    assert len(line.splitlines()) == 1, line
    assert line.startswith("darwin: ")
    assert key in line, line
    assert cure in line, line
    assert not list(runs.glob("*/*")), "nothing half-written"


def test_an_empty_and_a_short_text_are_refused(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    for content in ("", "much too short"):
        text.write_text(content)
        code, line = _run(
            ["dataset=textdir", f"dataset.path={text}", f"paths.runs={runs}",
             f"paths.data={tmp_path / 'data'}"], monkeypatch, capsys,
        )  # fmt: skip
        assert (code, len(line.splitlines())) == (2, 1), line
        assert "text.txt" in line or "dataset" in line, line
        assert not list(runs.glob("*/*"))


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    code, line = _run([f"paths.runs={blocked / 'runs'}"], monkeypatch, capsys)
    assert code == 2
    assert "paths.runs" in line
    assert "cannot be written" in line


def test_code_of_unknown_origin_is_refused_by_the_bare_process_sandbox(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = tmp_path / "edits.yaml"
    script.write_text("steps:\n  - {file: train.py, text: 'x = 1'}\n")
    code, line = _run(
        ["mutator=scripted", f"mutator.file={script}", "sandbox=process", f"paths.runs={runs}"],
        monkeypatch,
        capsys,
    )
    assert code == 2
    assert "sandbox.allow_untrusted=true" in line


def _run(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and what it said."""
    monkeypatch.setattr(sys, "argv", ["darwin_exp", *overrides])
    monkeypatch.setattr(command_line, "EXIT_CODES", [])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().err.strip()


def test_help_names_every_recipe_group_variant_and_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["darwin_exp", "--help"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for group, name in VARIANTS:
        assert group in text
        assert name in text
    for key, _, _ in configs.leaves(_compose("mutator=operators", "memory=json")):
        known_by_name = key.endswith(".name") or ".settings." in key
        assert known_by_name or key in text, key
    assert max(map(len, text.splitlines())) <= 100


def test_only_operational_keys_may_differ_on_resume(tmp_path: Path) -> None:
    config = _compose("+experiment=baseline")
    path = tmp_path / "config.yaml"
    path.write_text(configs.as_yaml(config))
    same = configs.from_yaml(path, [], {})
    assert list(configs.leaves(same)) == list(configs.leaves(config))

    longer = configs.from_yaml(path, ["n_generations=20", "workers=1", "max_hours=2"], {})
    configs.refuse_changed_score(same, longer)
    assert (longer.n_generations, longer.workers) == (20, 1)

    for override in ("budget_seconds=5", "seed=9", "dataset.dedup_blocks=false"):
        other = configs.from_yaml(path, [override], {})
        with pytest.raises(ConfigError, match=override.split("=")[0]):
            configs.refuse_changed_score(same, other)


MODELS = "mutator.models=[{name:small,weight:3},{name:own/coder,base_url:'http://127.0.0.1:8/v1'}]"


def test_what_hydra_understood_when_a_run_began_is_understood_when_it_is_resumed(
    tmp_path: Path,
) -> None:
    """A sweep types all of a job's overrides again; YAML would read these otherwise."""
    typed = [MODELS, "mutator.guidance='a, b: c'", "llm.prices={small:[0.1,2]}", "llm.max_usd=null"]
    config = _compose("mutator=openai", *typed)
    path = tmp_path / "config.yaml"
    path.write_text(configs.as_yaml(config))
    again = configs.from_yaml(path, typed, {})
    assert list(configs.leaves(again)) == list(configs.leaves(config))
    assert isinstance(again.mutator, schema.OpenaiConfig)
    assert [model.name for model in again.mutator.models] == ["small", "own/coder"]
    configs.refuse_changed_score(config, again)
    other = configs.from_yaml(path, [MODELS.replace("3", "2")], {})
    with pytest.raises(ConfigError, match=r"mutator\.models: the run was started with"):
        configs.refuse_changed_score(config, other)


def test_an_override_that_nobody_can_read_is_refused_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(configs.as_yaml(_compose()))
    with pytest.raises(ConfigError) as refusal:
        configs.from_yaml(path, ["seed=[1"], {})
    assert "seed=[1" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_mistyped_override_is_refused_on_resume_too(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(configs.as_yaml(_compose()))
    with pytest.raises(ValidationError, match="many"):
        configs.from_yaml(path, ["n_generations=many"], {})


def test_a_search_for_mfu_leaves_out_what_its_rule_would_flatter() -> None:
    from darwin_exp.parts import CONTEXT_WARM_UP, _leave_out_what_bends_mfu, build_mutator

    for fitness, left_out in (("perplexity", []), ("mfu", [CONTEXT_WARM_UP])):
        config = _compose(f"fitness={fitness}")
        _leave_out_what_bends_mfu(config)
        _leave_out_what_bends_mfu(config)  # as a resumed run does
        assert isinstance(config.mutator, schema.OperatorsConfig)
        assert config.mutator.without == left_out
        names = getattr(build_mutator(config.mutator), "names", ())
        assert ("context_warm_up" in names) == (not left_out)
