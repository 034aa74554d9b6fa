"""What an ablation needs of a finished run: its configuration, its environment, its data.

Reads: a run's folder. Writes: nothing; preparing data fills its own cache.
Raises: ConfigError, one line, for whatever would make the comparison worthless.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from darwin_exp import parts as workshop_of
from darwin_exp.ablate.verdicts import PERPLEXITY
from darwin_exp.chronicle import Agent, Chronicle
from darwin_exp.config import PROJECT, ConfigError, from_yaml, leaves
from darwin_exp.guidance import explain
from darwin_exp.journal import JournalError
from darwin_exp.parts import Workshop
from darwin_exp.schema import DarwinConfig, MutatorConfig, OpenaiConfig


def find_run(name: str, runs: Path = PROJECT / "runs") -> Path:
    """Return the folder of a run by its id, its path, or as the latest one.

    Raises:
        ConfigError: there is none.
    """
    for candidate in (runs / name, Path(name)):
        if (candidate / "config.yaml").is_file():
            return candidate.resolve()
    known = sorted((path.parent.name for path in runs.glob("*/config.yaml")), reverse=True)
    others = ", ".join([one for one in known if one != "latest"][:3])
    hint = f"the newest are {others}" if others else "there are none yet"
    raise ConfigError(f"{name}: no such run in {runs}; {hint}")


def read_run(run_folder: Path) -> tuple[Chronicle, Agent]:
    """Return a run's chronicle and its champion.

    Raises:
        ConfigError: it has no champion, or one that is the base.
    """
    run_id = run_folder.name
    try:
        chronicle = Chronicle.read(run_folder)
    except (JournalError, ValueError) as error:
        raise ConfigError(f"{run_id}: {error}") from error
    if chronicle.closing is None:
        raise ConfigError(
            f"{run_id}: it has no champion, because it did not get to its end; go on with "
            f"python -m darwin_exp resume={run_id}"
        )
    champion = chronicle.selected
    if champion is None:
        raise ConfigError(f"{run_id}: its journal does not hold its champion")
    if champion.genome_id == chronicle.base_genome.id:
        raise ConfigError(f"{run_id}: its champion is the base, so there is nothing to take apart")
    return chronicle, champion


def fitness_of(chronicle: Chronicle) -> str:
    """Return the name of what a run selected by."""
    return str(chronicle.config.get("fitness.name", PERPLEXITY))


def refuse_to_drop(chronicle: Chronicle) -> None:
    """Raise ConfigError where what parts contribute to perplexity does not say if they may go."""
    fitness = fitness_of(chronicle)
    if fitness != PERPLEXITY:
        raise ConfigError(
            f"{chronicle.run_id}: its fitness is {fitness} and an ablation measures perplexity "
            "only, which cannot tell what may be dropped; take it apart without --drop"
        )


def prepare(run_folder: Path, chronicle: Chronicle, announce: Callable[[str], None]) -> Workshop:
    """Return the workshop that the run worked in, if it still is the same.

    Raises:
        ConfigError: configuration, data, sandbox or machine are not as recorded.
    """
    config = _recorded_config(run_folder, chronicle)
    is_foreign = isinstance(config.mutator, OpenaiConfig)
    # The trainings need no mutator, and a script that it played may be gone by now.
    config.mutator = MutatorConfig(name="none")
    config.resume = None
    config.paths.runs = str(run_folder.parent)  # wherever it was moved to: hidden from candidates
    workshop = workshop_of.prepare_workshop(
        config,
        announce,
        chronicle.base_genome,
        may_fall_back=False,
        is_foreign=is_foreign,
    )
    recorded = chronicle.begun.payload["environment"]
    for name, value in workshop.environment.items():
        if recorded.get(name) != value:
            raise ConfigError(
                f"{run_folder.name}: it was measured with {name}={recorded.get(name)!r} and here "
                f"it is {value!r}, so other perplexities would come out; take it apart with the "
                "code and on the machine that it ran with, or run it again here"
            )
    before, now = chronicle.begun.measured["n_slots"], len(workshop.slots)
    if config.max_steps is None and before != now:
        raise ConfigError(
            f"{run_folder.name}: it trained on {before} slots at once and config.yaml says {now}; "
            f"under a clock that changes scores: put workers: {before} back"
        )
    return workshop


def _recorded_config(run_folder: Path, chronicle: Chronicle) -> DarwinConfig:
    path = run_folder / "config.yaml"
    try:
        config = from_yaml(path, [], {})
    except ConfigError:
        raise
    except Exception as error:  # OmegaConf's, which only `config` and `guidance` know
        raise ConfigError(f"{path}: {explain(error)}") from error
    for key, value, operational in leaves(config):
        recorded = chronicle.config.get(key, value)
        if not operational and recorded != value:
            raise ConfigError(
                f"{path}: {key} is {value!r} and the journal says {recorded!r}; put it back"
            )
    return config
