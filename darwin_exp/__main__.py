"""The command line: `python -m darwin_exp +experiment=NAME [group=variant] [key=value]`.

Hydra composes, `config` types and checks, `run` does the work. Hydra 1.3 would end a sweep at the
first job that calls sys.exit and turns composition errors into a traceback, so jobs only leave
their exit codes here and the process exits after Hydra has returned.
"""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from darwin_exp import config as schema
from darwin_exp import summary
from darwin_exp.config import ConfigError, DarwinConfig, Show
from darwin_exp.display import LiveDisplay, PlainDisplay, Watch, watch_for
from darwin_exp.guidance import explain, help_text
from darwin_exp.run import Command, run

EXIT_CODES: list[int] = []


class _Console(Console):
    """A console whose reader may go away (`| head`) without taking the run with it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@hydra.main(version_base="1.3", config_path=str(schema.CONF), config_name="config")
def _job(composed: DictConfig) -> None:
    """Run one job to its own end, whatever happens, and note its exit code."""
    EXIT_CODES.append(_exit_code_of(composed))
    if EXIT_CODES[-1] == summary.BY_SIGNAL:
        raise KeyboardInterrupt  # or a sweep would begin its next job


def _exit_code_of(composed: DictConfig) -> int:
    console = _Console()
    try:
        config = schema.typed(composed)
        return run(config, _command(composed), _watch(config, console))
    except ConfigError as error:
        _say(str(error))
        return summary.WRONG
    except OmegaConfBaseException as error:
        _say(explain(error))
        return summary.WRONG
    except KeyboardInterrupt:
        _say("interrupted before the run had begun")
        return summary.BY_SIGNAL
    except Exception:
        traceback.print_exc()
        _say("that is a defect of DARWIN; what was recorded is safe, and resume=latest goes on")
        return summary.WRONG


def _command(composed: DictConfig) -> Command:
    typed = HydraConfig.get()
    overrides = tuple(str(override) for override in typed.overrides.task)
    groups = {override.partition("=")[0] for override in overrides} & set(schema.GROUPS)
    in_sweep = typed.mode == RunMode.MULTIRUN
    arguments = shlex.join(overrides if in_sweep else sys.argv[1:])
    return Command(
        text=f"python -m darwin_exp {arguments}".strip(),
        overrides=overrides,
        chosen={group: composed[group] for group in groups},
        sweep_folder=Path(typed.sweep.dir).resolve() if in_sweep else None,
    )


def _watch(config: DarwinConfig, console: Console) -> Watch:
    if config.show is Show.auto:
        return watch_for(console)
    return LiveDisplay(console) if config.show is Show.live else PlainDisplay(console)


def _say(line: str) -> None:
    print(f"darwin: {line}", file=sys.stderr)


def main() -> None:
    """Run the command line and exit with the worst of its jobs' exit codes."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        sys.exit(0)
    OmegaConf.register_new_resolver("project_root", lambda: str(schema.PROJECT), replace=True)
    schema.register()
    # Hydra then raises what went wrong instead of printing a traceback and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        _job()
    except (HydraException, OmegaConfBaseException) as error:
        _say(explain(error))
        sys.exit(summary.WRONG)
    except OSError as error:  # Hydra makes the sweep's folder
        _say(f"{error.filename}: {error.strerror}; choose another folder")
        sys.exit(summary.WRONG)
    except KeyboardInterrupt:
        sys.exit(summary.BY_SIGNAL)
    sys.exit(summary.worst(EXIT_CODES))


if __name__ == "__main__":
    main()
