"""The command line: `python -m darwin_exp +experiment=NAME [group=variant] [key=value]`.

Hydra composes, `config` types and checks, `run` does the work. Hydra 1.3 would end a sweep at the
first job that calls sys.exit and turns composition errors into a traceback, so jobs only leave
their exit codes here and the process exits after Hydra has returned.

A sweep goes on where it was left with `sweep=latest`: a job whose run is finished is not run
again, one whose run is not is resumed, and the others start.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
import traceback
from dataclasses import replace

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from darwin_exp import launching, summary
from darwin_exp import sweep as sweeps
from darwin_exp.config import CONF, PROJECT, ConfigError, from_yaml, register, typed
from darwin_exp.display import LiveDisplay, PlainDisplay, Watch, watch_for
from darwin_exp.guidance import explain, help_text
from darwin_exp.parts import folder
from darwin_exp.run import Command, run
from darwin_exp.schema import GROUPS, DarwinConfig, Show
from darwin_exp.signals import terminable
from darwin_exp.sweep import Sweep

EXIT_CODES: list[int] = []
SETTLED = (summary.OK, summary.NONE_OK, summary.LOST)  # the others leave something to go on with


class _Console(Console):
    """A console whose reader may go away (`| head`) without taking the run with it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(composed: DictConfig) -> None:
    """Run one job to its own end, whatever happens, and note its exit code."""
    EXIT_CODES.append(_exit_code_of(composed))
    if EXIT_CODES[-1] == summary.BY_SIGNAL:
        raise KeyboardInterrupt  # or a sweep would begin its next job


def _exit_code_of(composed: DictConfig) -> int:
    console = _Console()
    try:
        at_work = launching.sweep_at_work()
        if at_work is not None:
            return _exit_code_in_sweep(composed, at_work, console)
        config = typed(composed)
        if config.sweep is not None:
            raise ConfigError(
                f"sweep={config.sweep}: this command is no sweep; type the sweep's own, with -m or "
                "+sweeps=NAME, and with resume=RUN_ID to go on with a single run"
            )
        return run(config, _command(composed), _watch(config, console))
    except ConfigError as error:
        _say(str(error))
        return summary.WRONG
    except OmegaConfBaseException as error:
        _say(explain(error))
        return summary.WRONG
    except KeyboardInterrupt:
        _say("interrupted")
        return summary.BY_SIGNAL
    except Exception:
        traceback.print_exc()
        sweep = launching.sweep_at_work()
        goes_on = "resume=latest" if sweep is None else f"the same command with sweep={sweep.id}"
        _say(f"that is a defect of DARWIN; what was recorded is safe, and {goes_on} goes on")
        return summary.WRONG


def _exit_code_in_sweep(composed: DictConfig, sweep: Sweep, console: Console) -> int:
    """Run a sweep's job, resume its run, or return the exit code of the run that it has finished.

    Raises: as `run` does.
    """
    command = _command(composed)
    number, total = HydraConfig.get().job.num + 1, len(sweep.plan.jobs)
    title = f"job {number} of {total}: {sweep.plan.label(command.job)}"
    before = sweep.run_of(command.job)
    if before is None:
        console.print(Text(title, "bold"))
        config = typed(composed)
        config.sweep = None
        return run(config, command, _watch(config, console))
    config = typed(composed)
    recorded = from_yaml(before / "config.yaml", [], {})
    code = sweeps.exit_code_of(before)
    if code is not None and config.n_generations <= recorded.n_generations:
        console.print(Text(f"{title}: finished before as {before.name}, exit code {code}", "bold"))
        return code
    console.print(Text(f"{title}: going on with {before.name}", "bold"))
    config.sweep, config.resume = None, before.name
    config.paths.runs = str(before.parent)
    settings = tuple(one for one in command.overrides if not one.startswith(("+", "~")))
    return run(config, replace(command, overrides=settings), _watch(config, console))


def _command(composed: DictConfig) -> Command:
    overrides = tuple(str(override) for override in HydraConfig.get().overrides.task)
    groups = {override.partition("=")[0] for override in overrides} & set(GROUPS)
    chosen = {group: composed[group] for group in groups}
    sweep = launching.sweep_at_work()
    if sweep is None:
        return Command(
            f"python -m darwin_exp {shlex.join(sys.argv[1:])}".strip(), overrides, chosen
        )
    own = tuple(one for one in overrides if one.partition("=")[0] not in launching.NO_PART_OF_A_JOB)
    return Command(
        text=f"python -m darwin_exp {shlex.join(own)}",
        overrides=own,
        chosen=chosen,
        sweep_folder=sweep.folder,
        job=launching.job_of(own, sweep.plan.varied),
        sweep_tags={
            "mlflow.runName": f"{sweep.plan.name} {sweep.id}",
            "darwin.command": sweep.plan.command,
        },
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
    OmegaConf.register_new_resolver("project_root", lambda: str(PROJECT), replace=True)

    @functools.cache  # one command is one sweep, however often Hydra asks
    def sweep_folder(runs: str, name: str | None) -> str:
        return str(sweeps.new_or_named(folder(runs), name))

    OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)
    register()
    # Hydra then raises what went wrong instead of printing a traceback and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        with terminable():
            code = _run_jobs()
    finally:
        launching.end_sweep()
    sys.exit(code)


def _run_jobs() -> int:
    try:
        _job()
    except (HydraException, OmegaConfBaseException) as error:
        _say(explain(error))
        if (sweep := launching.sweep_at_work()) is not None:
            sweep.discard_if_unused()
        return summary.WRONG
    except OSError as error:  # Hydra makes the sweep's folder
        _say(f"{error.filename}: {error.strerror}; choose another folder")
        return summary.WRONG
    except KeyboardInterrupt:
        EXIT_CODES.append(summary.BY_SIGNAL)
    code = summary.worst(EXIT_CODES)
    if (sweep := launching.sweep_at_work()) is not None:
        _close_sweep(sweep, code)
    return code


def _close_sweep(sweep: Sweep, code: int) -> None:
    """Show and publish what a sweep found; what goes wrong here is said and changes nothing."""
    from darwin_exp.compare.closing import close_sweep

    interrupted = code == summary.BY_SIGNAL
    try:
        close_sweep(sweep.folder, code, None if interrupted else _Console(), _say)
    except KeyboardInterrupt:
        _say(f"interrupted before it was compared: python -m darwin_exp.compare {sweep.id}")
    except Exception as error:
        _say(f"the runs are safe, but they could not be compared: {error}")
    if interrupted or not set(EXIT_CODES) <= set(SETTLED):
        _say(f"go on with: {launching.command_line(f'sweep={sweep.id}')}")


if __name__ == "__main__":
    main()
