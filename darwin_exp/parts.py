"""The workshop: turns a typed configuration into the parts of a run, and checks that they fit.

Reads: the configuration, the base genome, the prepared data, this machine.
Writes: nothing of a run; preparing data and measuring the machine's peak fill their own caches.
Raises: ConfigError, before anything of the run is on disk, for whatever could not work.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darwin_exp import execution, model_access, people_access, schema
from darwin_exp.config import PROJECT, ConfigError
from darwin_exp.containment import assign_gpus, choose_sandbox, environment_of, sandbox_spec
from darwin_exp.evolution import Plan
from darwin_exp.fitness import Fitness, MfuFitness, PerplexityFitness, WeightedFitness
from darwin_exp.individual import (
    DataSpec,
    EvaluationSpec,
    Genome,
    SandboxSpec,
    TrainingSpec,
)
from darwin_exp.journal import Journal
from darwin_exp.memory import (
    JsonMemory,
    NoMemory,
    as_snapshot,
    from_snapshot,
    load_library,
)
from darwin_exp.protocols import (
    Executor,
    InfrastructureFailure,
    Lesson,
    Memory,
    Mutator,
    Selector,
)
from darwin_exp.schema import DarwinConfig
from darwin_exp.selection import NSGA2, RandomSelection, Roulette, Tournament, Truncation
from data import DataError, DatasetRequest, DataUnavailable, prepare, read_meta, verify

if TYPE_CHECKING:
    from darwin_exp.llm import Recording

Announce = Callable[[str], None]
CONTEXT_WARM_UP = "context warm-up"  # what an edit is about, as mutator.without takes it
MOST_SLOTS_BY_DEFAULT = 2


def folder(path: str) -> Path:
    """Return a configured folder; relative ones lie in the checkout, wherever one runs from."""
    return (PROJECT / path).resolve()


@dataclass(frozen=True)
class Workshop:
    """What a run needs of its surroundings, checked and ready.

    Attributes:
        config: as it will run: fallbacks and automatic choices are filled in.
        environment: what scores depend on beside the genome.
        image: name of the containers' image; the environment holds its id.
        recording: what is replayed instead of asking models and training; None in a live run.
    """

    config: DarwinConfig
    base: Genome
    data: DataSpec
    slots: list[tuple[int, ...]]
    environment: dict[str, Any]
    image: str | None = None
    recording: Recording | None = None

    @property
    def environment_id(self) -> str:
        """Twelve digits; individuals are compared only where they are equal."""
        text = json.dumps(self.environment, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def prepare_workshop(
    config: DarwinConfig,
    announce: Announce,
    base: Genome | None = None,
    may_fall_back: bool = True,
    is_foreign: bool = False,
) -> Workshop:
    """Check everything that a run needs before it begins.

    Args:
        base: the recorded base genome of a resumed run; None reads genome.dir.
        may_fall_back: whether another data set or sandbox may stand in, loudly. Never on resume
            or in a sweep, where it would mix what cannot be compared.
        is_foreign: whether the code that will be trained is somebody else's, whatever mutator the
            configuration names.

    Raises:
        ConfigError: names the key or file, and the cure.
    """
    _check_folders(config)
    _anchor_paths(config)
    _leave_out_what_bends_mfu(config)
    people_access.check(config)
    recording = model_access.recording_of(config, folder(config.paths.runs))
    asks_models = isinstance(config.mutator, schema.OpenaiConfig)
    trusted = not asks_models and build_mutator(config.mutator).trusted
    build_selector(config.selection)
    build_fitness(config.fitness)
    config.workers = assign_gpus(config.sandbox, config.workers)
    if config.workers is None:
        cores = len(os.sched_getaffinity(0))
        config.workers = max(1, min(MOST_SLOTS_BY_DEFAULT, cores // config.sandbox.threads))
    if config.executor.name == "serial":
        config.workers = 1
    try:
        slots = execution.slots(config.workers, config.sandbox.threads)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # Whatever is only replayed runs no code of anybody.
    is_harmless = not is_foreign and (trusted or recording is not None)
    image = choose_sandbox(config.sandbox, announce, is_harmless, may_fall_back)
    genome = base or base_genome(config, announce)
    data = _prepare_data(config, announce, may_fall_back)
    n_requested = build_plan(config, data).n_requested
    model_access.check(config, n_requested, genome, announce, is_new=base is None)
    return Workshop(config, genome, data, slots, _environment(config, data), image, recording)


def base_genome(config: DarwinConfig, announce: Announce) -> Genome:
    """Read genome.dir and give it the trainer's settings, unless it brings its own.

    Raises:
        ConfigError: it is no genome.
    """
    path = Path(config.genome.dir).expanduser()
    if not path.is_absolute() and not path.is_dir():
        path = PROJECT / path
    try:
        genome = Genome.from_folder(path)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if "settings.json" in genome.as_dict:
        announce(f"genome.dir: {path} brings its own settings.json; trainer's are not used")
        try:
            config.trainer.settings = json.loads(genome.as_dict["settings.json"])
        except ValueError as error:
            raise ConfigError(f"genome.dir: {path / 'settings.json'}: {error}") from error
        return genome
    text = json.dumps(config.trainer.settings, indent=2) + "\n"
    return genome.with_files({"settings.json": text})


def build_mutator(chosen: schema.MutatorConfig) -> Mutator:
    """Make the mutator that was chosen, among those that ask nobody.

    Raises:
        ConfigError: its settings or its file do not fit.
    """
    from darwin_exp.mutation import NoMutation, Operators, Scripted

    assert not isinstance(chosen, schema.OpenaiConfig)  # see model_access.build_mutator
    if isinstance(chosen, schema.OperatorsConfig):
        fewest, most = chosen.edits_per_child
        try:
            return Operators((fewest, most), chosen.max_drafts, chosen.only, chosen.without)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if isinstance(chosen, schema.ScriptedConfig):
        try:
            return Scripted.from_file(Path(chosen.file).expanduser())
        except (OSError, ValueError) as error:
            raise ConfigError(f"mutator.file: {error}") from error
    return NoMutation()


def build_selector(chosen: schema.SelectionConfig) -> Selector:
    """Make the selection strategy that was chosen; a new one is added here and in conf/."""
    if isinstance(chosen, schema.TournamentConfig):
        return Tournament(size=chosen.size, elitism=chosen.elitism)
    if isinstance(chosen, schema.Nsga2Config):
        return NSGA2(objectives=tuple(chosen.objectives), elitism=chosen.elitism)
    if chosen.name == "roulette":
        return Roulette(elitism=chosen.elitism)
    if chosen.name == "random":
        return RandomSelection(elitism=chosen.elitism)
    return Truncation(elitism=chosen.elitism)


def build_fitness(chosen: schema.FitnessConfig) -> Fitness:
    """Make the fitness that was chosen.

    Raises:
        ConfigError: its weights do not fit.
    """
    if isinstance(chosen, schema.WeightedConfig):
        try:
            return WeightedFitness(chosen.perplexity_weight, chosen.mfu_weight)
        except ValueError as error:
            raise ConfigError(f"fitness: {error}") from error
    if isinstance(chosen, schema.MfuConfig):
        return MfuFitness(chosen.perplexity_margin_percent)
    return PerplexityFitness()


def build_memory(config: DarwinConfig, run_id: str, journal: Journal) -> Memory:
    """Make the memory that was chosen.

    A library is read once, when the run begins: what it held then is kept in the journal.
    """
    chosen = config.memory
    if not isinstance(chosen, schema.JsonMemoryConfig):
        return NoMemory()
    root = folder(config.paths.memory)
    problems: list[str] = []
    library: tuple[Lesson, ...] = ()
    if chosen.scope is schema.Scope.library:
        snapshot = journal.once(
            "library", "library", lambda: (as_snapshot(load_library(root, run_id, problems)), {})
        )
        library = from_snapshot(snapshot.payload)
    memory = JsonMemory(root / run_id, chosen.scope.value, chosen.capacity, library)
    memory.problems += problems
    return memory


def build_executor(workshop: Workshop, watch: Callable[[int, str], None]) -> Executor:
    """Make the executor that was chosen, with its slots."""
    config = workshop.config
    if workshop.recording is not None:
        from darwin_exp.llm import ReplayExecutor

        return ReplayExecutor(workshop.recording, len(workshop.slots))
    spec = build_specs(config, None)[2]
    # Held-out text, other runs and their keys are hidden from candidates where the sandbox can.
    hidden = tuple(folder(p) for p in (config.paths.data, config.paths.runs, config.paths.memory))
    if config.dataset.path is not None:
        hidden += (folder(config.dataset.path),)
    if config.executor.name == "serial":
        return execution.SerialExecutor(workshop.slots[0], spec, hidden, watch)
    return execution.ThreadsExecutor(workshop.slots, spec, hidden, watch)


def build_plan(config: DarwinConfig, data: DataSpec) -> Plan:
    """Return the numbers of a run."""
    crossover = config.crossover
    return Plan(
        seed=config.seed,
        population_size=config.population_size,
        n_survivors=config.n_survivors,
        n_generations=config.n_generations,
        reject_duplicates=config.dedup is schema.Dedup.reject,
        keep_all_checkpoints=config.keep is schema.Keep.all,
        stagnation_generations=config.stagnation_generations,
        stuck_generations=config.hitl.stuck_generations,
        pair_with_peers=config.pairing.name == "peers",
        crossover_probability=(
            crossover.probability if isinstance(crossover, schema.MergeConfig) else 0.0
        ),
        max_repairs=config.repair.max_attempts,
        smoke_steps=getattr(config.mutator, "smoke_steps", 0),
        n_base_repeats=config.base.n_repeats,
        n_claim_seeds=config.promotion.n_seeds,
        n_equal_steps=config.promotion.n_equal_steps,
        n_timings=config.fitness.n_timings,
        max_steps=config.max_steps,
        has_test=read_meta(data.folder).splits["test"].tokens > config.trainer.context_length,
    )


def build_specs(
    config: DarwinConfig, peak_flops: float | None
) -> tuple[TrainingSpec, EvaluationSpec, SandboxSpec]:
    """Return how every genome of this environment is trained, scored and contained."""
    box = config.sandbox
    training = TrainingSpec(
        budget_seconds=config.budget_seconds,
        max_steps=config.max_steps,
        seed=0,  # every trial gets its own
        context_length=config.trainer.context_length,
        device=box.device,
        threads=box.threads,
        startup_seconds=box.startup_seconds,
        memory_mb=box.memory_mb,
        file_mb=box.file_mb,
        max_processes=box.max_processes,
    )
    evaluation = EvaluationSpec(
        split="val",
        max_logits_bytes=config.eval.max_logits_bytes,
        n_prefixes=config.eval.n_prefixes,
        batch_tokens=config.eval.batch_tokens,
        seconds=config.eval.seconds,
        peak_flops=peak_flops,
    )
    return training, evaluation, sandbox_spec(box)


def measure_peak(workshop: Workshop, announce: Announce) -> float | None:
    """Return the FLOP/s that MFU is measured against on this machine; None where unknown."""
    from darwin_exp.evaluation.mfu import load_or_measure_peak

    box = workshop.config.sandbox
    cache = folder(workshop.config.paths.runs) / ".peaks"
    try:
        peak = load_or_measure_peak(cache, box.threads, workshop.slots, box.device)
    except (OSError, RuntimeError, InfrastructureFailure) as error:
        announce(f"MFU is left out: the machine's peak could not be measured ({error})")
        return None
    return None if peak is None else peak.flops


# --- what could not work -------------------------------------------------------------------------


def _check_folders(config: DarwinConfig) -> None:
    for key, path in (("paths.runs", config.paths.runs), ("paths.memory", config.paths.memory)):
        place = folder(path)
        try:
            place.mkdir(parents=True, exist_ok=True)
            probe = place / f".writable-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"{key}: {place} cannot be written ({error.strerror}); choose another folder with "
                f"{key}=FOLDER"
            ) from error


def _anchor_paths(config: DarwinConfig) -> None:
    """Make the user's own paths absolute, so that the run can be resumed from anywhere."""
    if config.dataset.path is not None and Path(config.dataset.path).expanduser().exists():
        config.dataset.path = str(Path(config.dataset.path).expanduser().resolve())
    if isinstance(config.mutator, schema.ScriptedConfig):
        config.mutator.file = str(Path(config.mutator.file).expanduser().resolve())


def _leave_out_what_bends_mfu(config: DarwinConfig) -> None:
    """Keep an edit out of searches for MFU that its rule would flatter.

    Every token is counted with the attention of the whole context, which training that begins with
    short sequences does not do.
    """
    if config.fitness.name == "perplexity" or not isinstance(
        config.mutator, schema.OperatorsConfig
    ):
        return
    if CONTEXT_WARM_UP not in config.mutator.without:
        config.mutator.without = [*config.mutator.without, CONTEXT_WARM_UP]


def _prepare_data(config: DarwinConfig, announce: Announce, may_fall_back: bool) -> DataSpec:
    try:
        data = prepare(_request(config), announce)
    except DataUnavailable as missing:
        if not may_fall_back or config.dataset.name != "shakespeare":
            raise ConfigError(f"dataset={config.dataset.name}: {missing}") from missing
        announce(
            f"dataset: {config.dataset.name} cannot be had ({missing}). Going on with "
            "dataset=stdlib, Python's own sources; its perplexities are not Shakespeare's"
        )
        config.dataset.name = "stdlib"
        config.dataset.tokenizer = schema.Tokenizer.bytes
        data = _or_refuse(lambda: prepare(_request(config), announce))
    except DataError as error:
        raise ConfigError(str(error)) from error
    _or_refuse(lambda: verify(data))
    return data


def _or_refuse(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except DataError as error:
        raise ConfigError(str(error)) from error


def _request(config: DarwinConfig) -> DatasetRequest:
    chosen = config.dataset
    train, val, gate, test = chosen.splits  # four, as `config.check` made sure
    return DatasetRequest(
        name=chosen.name,
        tokenizer=chosen.tokenizer.value,
        path=None if chosen.path is None else Path(chosen.path).expanduser(),
        splits=(train, val, gate, test),
        dedup_blocks=chosen.dedup_blocks,
        max_overlap=chosen.max_overlap,
        context_length=config.trainer.context_length,
        options=chosen.options,
        root=folder(config.paths.data),
    )


def _environment(config: DarwinConfig, data: DataSpec) -> dict[str, Any]:
    return {
        "data": data.content_hash,
        "context_length": config.trainer.context_length,
        "budget_seconds": config.budget_seconds,
        "max_steps": config.max_steps,
        **environment_of(config.sandbox),
        "max_logits_bytes": config.eval.max_logits_bytes,
        "n_prefixes": config.eval.n_prefixes,
        "scorer": _hash_of_sources(PROJECT / "darwin_exp" / "evaluation"),
        "torch": version("torch"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {_cpu_model()}",
    }


def _hash_of_sources(package: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(package.glob("*.py")):
        hasher.update(path.name.encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()[:12]


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
