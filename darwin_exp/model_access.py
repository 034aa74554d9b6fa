"""Language models of a run: checked before it begins, and built into the mutator that asks them.

Reads: the configuration, the environment's keys, a recording that is replayed.
Writes: a recording, where one is asked for.
Never: keeps a key, or begins a run whose models cannot be reached or paid for.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from threading import Event as Flag
from typing import TYPE_CHECKING

from darwin_exp import schema
from darwin_exp.config import PROJECT, ConfigError
from darwin_exp.individual import DataSpec, Genome, ModelSpec
from darwin_exp.journal import Journal, JournalError
from darwin_exp.protocols import Event, ModelsUnavailable, Mutator
from darwin_exp.schema import DarwinConfig
from data import read_meta

if TYPE_CHECKING:
    from darwin_exp.llm import Recording
    from darwin_exp.llm.choosing import Choosing
    from darwin_exp.llm.money import Money
    from darwin_exp.mutation.prompt import Surroundings

Announce = Callable[[str], None]
CHECK_SECONDS = 10.0
CONTRACT = PROJECT / "trainer_base" / "CONTRACT.md"
FITNESS_IN_WORDS = {
    "perplexity": (
        "held-out perplexity after training, lower is better; fitness is minus its natural "
        "logarithm, so +0.01 of fitness is 1 % less perplexity"
    ),
    "mfu": (
        "model FLOPs utilisation (MFU) of the training, higher is better, as long as held-out "
        "perplexity is no worse than the base's; fitness is the MFU, and below 0 where perplexity "
        "is worse, by as many nats"
    ),
    "weighted": (
        "a weighted sum of gains in held-out perplexity (lower) and MFU (higher); fitness adds up "
        "differences of logarithms, so +0.01 is about 1 %"
    ),
}


def models_of(chosen: schema.OpenaiConfig) -> tuple[tuple[ModelSpec, float], ...]:
    """Return each language model that agents may own, with its weight."""
    if not chosen.models:
        only = ModelSpec(chosen.model, chosen.base_url, chosen.temperature, chosen.key_env)
        return ((only, 1.0),)
    return tuple(
        (
            ModelSpec(
                model.name,
                model.base_url or chosen.base_url,
                chosen.temperature if model.temperature is None else model.temperature,
                model.key_env or chosen.key_env,
            ),
            model.weight,
        )
        for model in chosen.models
    )


def recording_of(config: DarwinConfig, runs: Path) -> Recording | None:
    """Return what is replayed; None where models are asked live.

    Raises:
        ConfigError: there is no such recording, or it is damaged.
    """
    asks_models = isinstance(config.mutator, schema.OpenaiConfig)
    if not asks_models or config.llm.mode is not schema.Mode.replay:
        return None
    from darwin_exp.llm import Recording

    named = str(config.llm.recording)
    path = Path(named).expanduser()
    if not path.exists():
        path = runs / named
    if not path.exists():
        raise ConfigError(
            f"llm.recording={named}: no such file, and no such run in {runs}; name the file that "
            "llm.mode=record wrote, a run id, or latest"
        )
    try:
        recording = Recording.read(path.resolve())
        config.llm.recording = str(path.resolve())  # `latest` is soon another run
        return recording
    except (OSError, ValueError, JournalError) as error:
        raise ConfigError(f"llm.recording={named}: {error}") from error


def keep_recording(config: DarwinConfig, events: Sequence[Event]) -> None:
    """Write what happened to where it can be replayed from, if that was asked for.

    Raises:
        OSError: the file cannot be written.
    """
    if config.llm.mode is schema.Mode.record and config.llm.recording is not None:
        from darwin_exp.llm import write_recording

        write_recording(events, Path(config.llm.recording).expanduser())


def check(
    config: DarwinConfig, n_requested: int, base: Genome, announce: Announce, is_new: bool
) -> None:
    """Find out whether the models answer and may be paid for, and say what a run may cost.

    Args:
        is_new: whether the run has yet to begin. One that is resumed may have no more to ask, or
            may have to wait for its endpoint: what is missing is then said, and no reason to stop.

    Raises:
        ConfigError: no key, a wrong one, no such endpoint or model, or a price that is missing.
    """
    chosen = config.mutator
    if not isinstance(chosen, schema.OpenaiConfig) or config.llm.mode is schema.Mode.replay:
        return
    from darwin_exp.llm import endpoints

    if config.llm.mode is schema.Mode.record:
        config.llm.recording = str(Path(str(config.llm.recording)).expanduser().resolve())
    models = [model for model, _ in models_of(chosen)]
    money = _money(config)
    try:
        endpoints.check_addresses(models)  # or a typing error in one would be asked for its price
        money.check_prices(models)
        for note in endpoints.check(models, CHECK_SECONDS):
            announce(note)
    except ModelsUnavailable as missing:
        if is_new:
            raise ConfigError(str(missing)) from missing
        announce(str(missing))
        return
    names = ", ".join(sorted({f"{model.name} at {model.base_url}" for model in models}))
    calls, code = _calls_and_code(chosen, base)
    estimate = money.estimate(
        n_requested,
        max_drafts=chosen.max_drafts,
        max_repairs=config.repair.max_attempts,
        prompt_tokens=min(chosen.prompt_tokens, 3_000 + code // 3),
        answer_tokens=min(chosen.answer_tokens, 1_000),
        models=models,
        calls_per_rewrite=calls,
    )
    announce(f"language models: {names}; {estimate}")


def build_mutator(
    config: DarwinConfig,
    data: DataSpec,
    machine: str,
    journal: Journal,
    stopping: Flag,
    announce: Announce,
    recording: Recording | None,
    data_folder: Path,
) -> Mutator:
    """Make the mutator that asks language models.

    Args:
        machine: the processor's name, for prompts.
        stopping: set once the run is to end; nobody waits for an answer then.
        data_folder: where downloads are kept: the vocabulary that prompts are counted with.

    Raises:
        ModelsUnavailable: that vocabulary was there when the run began, and is not now.
    """
    from darwin_exp.llm import Exchanges, Patience
    from darwin_exp.llm.wire import Wire
    from darwin_exp.mutation import LanguageModelMutator
    from darwin_exp.tokens import ESTIMATE, TokenCounter

    chosen = config.mutator
    assert isinstance(chosen, schema.OpenaiConfig)
    # Prompts are compared when a run is resumed or replayed, here or on another machine.
    box, hours = config.sandbox, config.max_hours
    counter = TokenCounter.load(data_folder, announce)
    told = journal.once(
        "prompting",
        "prompting",
        lambda: (
            {
                "device": (
                    f"{box.device}, {box.threads} thread(s), {machine}; Python "
                    f"{platform.python_version()}, torch {version('torch')}"
                ),
                "counted_by": counter.name,
            },
            {},
        ),
    )
    if told.payload["counted_by"] == ESTIMATE:
        counter = TokenCounter.estimating()
    elif counter.name == ESTIMATE:
        raise ModelsUnavailable(
            "the prompts of this run were counted with GPT-2's vocabulary, which cannot be had now"
        )
    exchanges = Exchanges(
        journal,
        Wire(timeout_seconds=config.llm.timeout_seconds),
        _choosing(chosen, config.seed, journal),
        _money(config),
        counter.count,
        stopping,
        announce,
        outage=config.llm.outage.value,
        recording=recording,
        patience=Patience(max_retries=config.llm.max_retries),
        deadline=math.inf if hours is None else time.monotonic() + 3600 * hours,
    )
    return LanguageModelMutator(
        exchanges,
        _surroundings(config, chosen, data, told.payload["device"]),
        form=chosen.form.value,
        chunk_probability=chosen.chunk_probability,
        max_drafts=chosen.max_drafts,
        prompt_tokens=chosen.prompt_tokens,
        answer_tokens=chosen.answer_tokens,
        count=counter,
    )


def _calls_and_code(chosen: schema.OpenaiConfig, base: Genome) -> tuple[int, int]:
    """Return how many calls a rewrite takes, and how many bytes of code each of them holds."""
    sizes = {file: len(text.encode()) for file, text in base.files}
    if chosen.form is not schema.Form.chunks:
        return 1, sum(sizes.values())
    from darwin_exp.mutation.chunks import chunks_of

    chunks = [chunk for chunk in chunks_of(base) if chunk.is_editable]
    if not chunks:
        return 1, 0
    # Each is shown with the file that it is from.
    shown = sum(sizes[chunk.file] + len(chunk.text.encode()) for chunk in chunks)
    return max(1, math.ceil(chosen.chunk_probability * len(chunks))), shown // len(chunks)


def _money(config: DarwinConfig) -> Money:
    from darwin_exp.llm.money import Money

    llm = config.llm
    prices = {name: (float(price[0]), float(price[1])) for name, price in llm.prices.items()}
    return Money(llm.max_usd, llm.max_tokens, llm.max_calls, prices)


def _choosing(chosen: schema.OpenaiConfig, seed: int, journal: Journal) -> Choosing:
    from darwin_exp.llm.choosing import Bandit, Own, Weighted

    models = models_of(chosen)
    if chosen.choice is schema.Choice.own:
        return Own(models)
    if chosen.choice is schema.Choice.weights:
        return Weighted(models, seed)
    return Bandit(models, seed, journal)


def _surroundings(
    config: DarwinConfig,
    chosen: schema.OpenaiConfig,
    data: DataSpec,
    device: str,
) -> Surroundings:
    from darwin_exp.mutation.prompt import Surroundings

    return Surroundings(
        device=device,
        budget_seconds=config.budget_seconds,
        max_steps=config.max_steps,
        memory_mb=config.sandbox.memory_mb,
        context_length=config.trainer.context_length,
        vocab_size=data.vocab_size,
        train_tokens=read_meta(data.folder).splits["train"].tokens,
        fitness=FITNESS_IN_WORDS[config.fitness.name],
        contract=CONTRACT.read_text(encoding="utf-8"),
        guidance=chosen.guidance,
        # Where steps bound a run and perplexity judges it, a repeated run asks the very same.
        speed_counts=config.max_steps is None or config.fitness.name != "perplexity",
    )
