"""Concerns: what would be refused once it is carried out, told before a person approves it.

Reads: the content of a request, the code of whoever asked, and who lives.
Never: decides: the run reads what was approved by the same rules, and strictly (G3, G4).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from darwin_exp.chronicle import Agent, Chronicle
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
        genome: the code that approved files would join: of whoever asked, or of the fittest that
            descends from it; None where nobody asked, or where it is not known yet.
        sources: the ways of getting text that the configuration allows; None where it is unknown.
        is_line_dead: whether neither who asked nor any descendant lives any longer.
    """

    genome: Genome | None = None
    sources: Collection[str] | None = None
    is_line_dead: bool = False

    @classmethod
    def of(cls, chronicle: Chronicle | None, askers: Sequence[str]) -> Surroundings:
        """Find them in what the run has recorded.

        Args:
            askers: all who asked, in their order.
        """
        if chronicle is None:
            return cls()
        heir, is_line_dead = _heir(chronicle, askers)
        try:
            genome = None if heir is None else chronicle.genome_of(heir)
        except KeyError:
            genome = None
        return cls(genome, chronicle.config.get(SOURCES_KEY), is_line_dead)


@dataclass(frozen=True)
class Concern:
    """What a person should know of a request that is still to be carried out.

    Attributes:
        refusal: why it would be refused; empty where it would not.
        remark: what it would do that its content does not say.
    """

    refusal: str = ""
    remark: str = ""


NO_CONCERN = Concern()


def concern_about(
    standing: Standing, outcomes: Outcomes, surroundings: Callable[[], Surroundings]
) -> Concern:
    """Return what is to be known of a request, where it is still to be carried out."""
    came = outcomes.of_request(standing)
    if came is not None and (came.tone != "waiting" or standing.granted_content is None):
        return NO_CONCERN
    content, known = standing.granted_content or standing.request.content, surroundings()
    if refusal := concern(standing.request, content, known):
        return Concern(refusal)
    return Concern(remark=_remark(standing.request, content, known))


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
    # Whose code it will be is not certain: the asker's, or a descendant's that is yet to be born.
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
            if known.is_line_dead:
                raise Refused("neither who asked for it nor any descendant lives")
        case RequestType.LIBRARY:
            _check_library(requirement_of(content))
        case RequestType.RESOURCES:
            Setting.read(content)
        case RequestType.BUDGET:
            check_budget(*key_and_value(request.type, content))


def _remark(request: Request, content: str, known: Surroundings) -> str:
    """Return which files of the code a restructuring would replace: its content names all alike."""
    if request.type is not RequestType.FILE_STRUCTURE or known.genome is None:
        return ""
    there = known.genome.as_dict
    files = TreeWish.read(request.type, content).files
    replaced = [repr(path) for path, text in sorted(files.items()) if there.get(path, text) != text]
    if not replaced:
        return ""
    return f"it replaces all of {', '.join(replaced)} in the code of whoever asked"


def _heir(chronicle: Chronicle, askers: Sequence[str]) -> tuple[str | None, bool]:
    """Return whose code approved files would join by now, and whether that line is dead.

    Whoever will live descends from those who lived when the last generation was closed.
    """
    last = max(
        chronicle.of_kind("generation"), key=lambda one: one.payload["generation"], default=None
    )
    if last is None:
        return next(iter(askers), None), False
    living = [chronicle.agent(name) for name in last.payload["population"]]
    for asker in askers:
        line = _descendants(chronicle, asker)
        heirs = [one for one in living if one is not None and one.individual_id in line]
        if heirs:
            fittest = max(heirs, key=lambda one: (one.individual_id == asker, _fitness(one)))
            return fittest.individual_id, False
    return None, bool(askers)


def _descendants(chronicle: Chronicle, name: str) -> set[str]:
    found = {name}
    for one in sorted(chronicle.agents, key=lambda one: (one.generation, one.slot)):
        if found & set(one.parent_ids):
            found.add(one.individual_id)
    return found


def _fitness(agent: Agent) -> float:
    return -math.inf if agent.fitness is None else agent.fitness


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
