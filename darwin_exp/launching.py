"""Between Hydra and a sweep: which jobs a command line asks for, and which of them this one is.

Reads: the command line as Hydra composed it.
Writes: nothing; `sweep` keeps a sweep's folder.
Never: runs anything.

Hydra itself would lay the recipe over what a file in sweeps/ varies, because both are appended to
the defaults in that order, and knows nothing of a job beyond the one it runs. So, when a multirun
begins, the sweep's parameters are moved between the recipe and whatever else was typed, and the
jobs are listed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from darwin_exp import summary
from darwin_exp.config import ConfigError, is_operational
from darwin_exp.guidance import explain
from darwin_exp.parts import folder as anchored
from darwin_exp.sweep import PLAN, Overrides, Plan, Sweep, find

RECIPE, FILE = "+experiment=", "+sweeps="
# What says how a command is to be run, rather than which job it asks for.
NO_PART_OF_A_JOB = ("sweep", "resume", "+sweeps")

_at_work: list[Sweep] = []  # one at most; Hydra makes the callback, so nobody can hand it over


def sweep_at_work() -> Sweep | None:
    """Return the sweep that this process works at, if any."""
    return _at_work[-1] if _at_work else None


def end_sweep() -> None:
    """Let others work at the sweep. Idempotent."""
    while _at_work:
        _at_work.pop().close()


class ListJobs(Callback):
    """Hydra's callback: puts a sweep's overrides in order and lists its jobs before the first."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open the sweep's folder, or say in one line why it cannot be and end the process."""
        try:
            _begin(config)
        except (ConfigError, HydraException, OmegaConfBaseException) as error:
            # Hydra turns what a callback raises into a warning, except for this.
            line = str(error) if isinstance(error, ConfigError) else explain(error)
            print(f"darwin: {line}", file=sys.stderr)
            raise SystemExit(summary.WRONG) from error


def _begin(config: DictConfig) -> None:
    typed = [str(override) for override in config.hydra.overrides.task]
    in_order = arrange(typed, dict(config.hydra.sweeper.params or {}))
    with read_write(config), open_dict(config):
        config.hydra.overrides.task = in_order
        config.hydra.sweeper.params = {}
    named = OmegaConf.select(config, "sweep")
    folder = Path(str(config.hydra.sweep.dir)).resolve()
    if named is not None and not (folder / PLAN).is_file():
        find(anchored(str(config.paths.runs)), str(named))  # says which there are
    _at_work.append(Sweep(folder, plan_of(typed, in_order)))


def arrange(typed: Sequence[str], params: dict[str, Any]) -> list[str]:
    """Return a multirun's overrides: the recipe, then what the sweep varies, then the rest.

    Later ones win over earlier ones, so what was typed wins over the sweep's file and both win
    over the recipe.
    """
    keys = {_parsed(override).get_key_element() for override in typed}
    varied = [f"{key}={value}" for key, value in params.items() if key not in keys]
    recipes = [override for override in typed if override.startswith(RECIPE)]
    return [*recipes, *varied, *(one for one in typed if one not in recipes)]


def plan_of(typed: Sequence[str], in_order: Sequence[str]) -> Plan:
    """Return the jobs that a multirun's overrides ask for."""
    parsed = [_parsed(override) for override in in_order]
    varied = tuple(one.get_key_element() for one in parsed if one.is_sweep_override())
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    files = [override.removeprefix(FILE) for override in typed if override.startswith(FILE)]
    keys = (key.removeprefix("+") for key in varied if key != "seed")
    return Plan(
        name=files[0] if files else " x ".join(keys) or "seeds",
        command=command_line(),
        jobs=tuple(job_of(job, varied) for job in jobs),
        varied=varied,
    )


def job_of(overrides: Sequence[str], varied: Sequence[str]) -> Overrides:
    """Return the overrides that tell a job apart.

    Operational ones, such as `workers=4`, may be others when a sweep goes on, unless the sweep
    varies them.
    """
    return frozenset(
        override
        for override in overrides
        if (key := override.partition("=")[0]) in varied
        or not (key in NO_PART_OF_A_JOB or is_operational(key.lstrip("+")))
    )


def command_line(*more: str) -> str:
    """Return the command that was typed, without `sweep=...` and with more overrides."""
    kept = [argument for argument in sys.argv[1:] if not argument.startswith("sweep=")]
    return " ".join(["python -m darwin_exp", shlex.join([*kept, *more])]).strip()


def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)
