"""People of a run: how they are asked, built from the configuration and checked before it begins.

Reads: the configuration, the run's inbox, a recording that is replayed.
Writes: nothing; what it builds does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from darwin_exp import schema
from darwin_exp.config import ConfigError
from darwin_exp.effects import Effects
from darwin_exp.hitl.inbox import FILE_NAME, Inbox
from darwin_exp.hitl.notify import Notifier, NotifyError
from darwin_exp.hitl.policy import Policy, PolicyError
from darwin_exp.individual import DataSpec
from darwin_exp.journal import Journal
from darwin_exp.means import Means
from darwin_exp.people import People
from darwin_exp.protocols import Event
from darwin_exp.reviews import Reviews
from darwin_exp.schema import DarwinConfig
from darwin_exp.turns import Turns

Announce = Callable[[str], None]
_FROM_ENVIRONMENT = "env:"


def check(config: DarwinConfig) -> None:
    """Refuse a configuration under which people could not be asked as it says.

    Raises:
        ConfigError: names the key and the cure.
    """
    _policy(config)
    _notifier(config, lambda _: None)
    known = {"textdir", "stdlib", "shakespeare", "huggingface"}
    unknown = sorted(set(config.hitl.dataset_sources) - known)
    if unknown:
        raise ConfigError(
            f"hitl.dataset_sources={config.hitl.dataset_sources}: the sources are "
            f"{', '.join(sorted(known))}"
        )


def build_people(
    config: DarwinConfig,
    run_folder: Path,
    journal: Journal,
    n_slots: int,
    stopping: threading.Event,
    announce: Announce,
    show_waiting: Callable[[int], None],
    precedents: Iterable[Event] | None,
) -> tuple[People, Reviews]:
    """Make what asks and hears people, and has rewrites reviewed.

    Args:
        stopping: set once the run is to end; nobody is waited for then.
        show_waiting: told how many requests wait for an answer.
        precedents: decisions of the run that is replayed, in which nobody is asked anything; None
            in a live run.

    Raises:
        InboxError: the inbox is damaged.
    """
    before = list(journal.events() if precedents is None else precedents)
    people = People(
        journal,
        run_folder.name,
        Turns(n_slots),
        stopping,
        Inbox(run_folder / FILE_NAME) if precedents is None else None,
        _policy(config),
        _notifier(config, announce),
        announce,
        show_waiting,
        caps={
            "max_hours": config.max_hours,
            "llm.max_usd": config.llm.max_usd,
            "llm.max_tokens": config.llm.max_tokens,
            "llm.max_calls": config.llm.max_calls,
        },
        told=[event for event in before if event.kind == "inbox"],
    )
    reviews = Reviews(
        people,
        journal,
        config.hitl.review.value,
        config.hitl.ordinary_lines,
        known=[event.key for event in before if event.kind == "review"],
    )
    return people, reviews


def build_effects(
    config: DarwinConfig,
    journal: Journal,
    data: DataSpec,
    data_root: Path,
    forbidden: tuple[Path, ...],
    announce: Announce,
) -> Effects:
    """Make what carries out approvals.

    Args:
        data_root: where data sets are prepared.
        forbidden: folders that no text may be taken from.
    """
    box = config.sandbox
    means = Means(
        data.folder,
        data_root,
        config.dataset.max_overlap,
        tuple(config.hitl.dataset_sources),
        forbidden,
        box.image if isinstance(box, schema.DockerConfig) else None,
        announce,
    )
    return Effects(journal, means)


def _policy(config: DarwinConfig) -> Policy:
    told = config.hitl.policy
    ways: dict[str, Any] = {entry.name: getattr(told, entry.name).value for entry in fields(told)}
    try:
        hitl = config.hitl
        return Policy.of(
            ways, hitl.block, hitl.deadline_seconds, hitl.most_waiting_each, hitl.most_waiting
        )
    except PolicyError as error:
        raise ConfigError(str(error)) from error


def _notifier(config: DarwinConfig, problem: Announce) -> Notifier:
    url = config.hitl.notify_url
    if url.startswith(_FROM_ENVIRONMENT):  # an address may hold a secret, and keys are recorded
        name = url.removeprefix(_FROM_ENVIRONMENT)
        url = os.environ.get(name, "")
        if not url:
            raise ConfigError(f"hitl.notify_url: the environment variable {name} is not set")
    try:
        return Notifier(config.hitl.notify_command, url, problem)
    except NotifyError as error:
        raise ConfigError(str(error)) from error
