"""The shipped sweeps, each run to its end; apart from the others so that both run at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from darwin_exp import schema, sweep
from darwin_exp.chronicle import Chronicle
from tests.sweeps.command_line import FILES, Begin, ended, sweep_in


@pytest.mark.slow
@pytest.mark.parametrize("name", ["selection", "mutator", "population"])
def test_the_sweep_runs_to_its_end(name: str, begin: Begin, tmp_path: Path) -> None:
    key, settings, _ = FILES[name]
    command = ["-cd", ".", "+experiment=baseline", f"+sweeps={name}", "seed=0", "+debug=tiny",
               "tracking=none", "n_generations=0"]  # fmt: skip
    code, said = ended(begin(tmp_path, *command))
    assert code in (0, 1), said  # copies of a base that trains three steps are not always OK
    folder = sweep_in(tmp_path)
    runs = [Chronicle.read(one.run_folder) for one in sweep.members(folder)]
    assert [run.status for run in runs] == ["finished"] * len(settings)
    if key in schema.GROUPS:
        assert [run.config[f"{key}.name"] for run in runs] == settings
    told = json.loads((folder / "comparison.json").read_text())
    labels = [setting["label"] for setting in told["cohorts"][0]["settings"]]
    assert labels == (
        [f"{key}={one}" for one in settings] if key in schema.GROUPS else ["all runs"]
    )
