"""Concerns: what would be refused once it is carried out, told before a person approves it.

Reads: the content of a request, and the code of whoever asked.
Never: decides: the run reads what was approved by the same rules, and strictly (G3, G4).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace

from darwin_exp.chronicle import Chronicle
from darwin_exp.genome import Genome
from darwin_exp.hitl.asked import Refused, Request, RequestType, Standing
from darwin_exp.hitl.outcomes import Outcomes
from darwin_exp.hitl.patches import check_change
from darwin_exp.hitl.paths import PathRefused, all_allowed
from darwin_exp.hitl.requests import check_budget
from darwin_exp.hitl.wishes import DatasetWish, Setting, TreeWish, key_and_value, requirement_of

SOURCES_KEY = "hitl.dataset_sources"


@dataclass(frozen=True)
class Surroundings:
    """What a request is judged against, as far as it is known.

    Attributes:
        genome: the code of whoever asked; None where nobody did, or where it is not known yet.
        sources: the ways of getting text that the configuration allows; None where it is unknown.
    """

    genome: Genome | None = None
    sources: Collection[str] | None = None

    @classmethod
    def of(cls, chronicle: Chronicle | None, asked_by: str) -> Surroundings:
        """Find them in what the run has recorded."""
        if chronicle is None:
            return cls()
        try:
            genome = chronicle.genome_of(asked_by)
        except KeyError:
            genome = None
        return cls(genome, chronicle.config.get(SOURCES_KEY))


def concern_about(
    standing: Standing, outcomes: Outcomes, surroundings: Callable[[], Surroundings]
) -> str:
    """Return what would keep a request from being carried out, where that is still to come."""
    came = outcomes.of_request(standing)
    if came is not None and (came.tone != "waiting" or standing.granted_content is None):
        return ""
    content = standing.granted_content or standing.request.content
    return concern(standing.request, content, surroundings())


def concern(request: Request, content: str, known: Surroundings) -> str:
    """Return why a content would be refused when it is carried out; nothing where it would not.

    Args:
        content: what is, or would be, granted: the request's own, or what replaces it.
    """
    try:
        _carry_out(request, content, known)
    except (Refused, PathRefused) as refusal:
        return str(refusal)
    return ""


def check_replacement(request: Request, content: str, known: Surroundings) -> None:
    """Refuse a change that could not be carried out: once granted, it could only be revoked.

    Raises:
        Refused: it could not; the person who made it can mend it.
    """
    if request.type is RequestType.EDIT:
        check_change(content, request.content)
    # Whose code it will be is not certain: the asker's, or the fittest's where that one is dead.
    elif why := concern(request, content, replace(known, genome=None)):
        raise Refused(f"it could not be carried out: {why}")


def _carry_out(request: Request, content: str, known: Surroundings) -> None:
    match request.type:
        case RequestType.DATASET:
            _check_dataset(content, known.sources)
        case RequestType.SCRIPT | RequestType.FILE_STRUCTURE:
            wish = TreeWish.read(request.type, content)
            if known.genome is not None:
                wish.changes(known.genome)
            else:
                all_allowed([*wish.files, *wish.moves.values()], ())
        case RequestType.LIBRARY:
            _check_library(requirement_of(content))
        case RequestType.RESOURCES:
            Setting.read(content)
        case RequestType.BUDGET:
            check_budget(*key_and_value(request.type, content))


def _check_dataset(content: str, sources: Collection[str] | None) -> None:
    if sources is None:  # then any may be allowed, and only the form can be judged
        with suppress(ValueError, RecursionError):
            told = json.loads(content)
            sources = {str(told.get("source"))} if isinstance(told, dict) else ()
    DatasetWish.read(content, sources or ())


def _check_library(requirement: str) -> None:
    from darwin_exp.image.wheels import LibraryRefused, parse_requirement

    try:
        parse_requirement(requirement)
    except LibraryRefused as error:
        raise Refused(str(error)) from error
