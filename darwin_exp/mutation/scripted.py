"""A mutator that plays edits written down beforehand: for tests, demonstrations and replays.

Reads: its script, and the parent's genome.
Writes: nothing.
Never: draws a random number; the same request always gets the same proposal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from darwin_exp.individual import Edit, Genome, JobResult, Proposal, Reason
from darwin_exp.mutation.operators import EDITS
from darwin_exp.mutation.rewriting import replaced_once
from darwin_exp.protocols import EditFailed, EditRequest

_FORMS: tuple[frozenset[str], ...] = (
    frozenset({"operator", "parameters"}),
    frozenset({"operator"}),
    frozenset({"file", "search", "replace"}),
    frozenset({"file", "text"}),
    frozenset({"copy"}),
)


@dataclass(frozen=True)
class ScriptedStep:
    """One edit of a script, in exactly one of four forms.

    Attributes:
        operator: a built-in edit, made with `parameters`.
        file: the file that is changed: `search` is replaced by `replace` where it stands (it
            must stand there exactly once), or the whole file by `text`.
        copy: change nothing.
    """

    operator: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    file: str | None = None
    search: str | None = None
    replace: str | None = None
    text: str | None = None
    copy: bool = False

    def __post_init__(self) -> None:
        given = {name for name, value in vars(self).items() if value not in (None, {}, False)}
        # An empty replacement or an empty file is a value too, which the test above lets through.
        if given not in _FORMS:
            forms = ", ".join("{" + ", ".join(sorted(form)) + "}" for form in _FORMS)
            raise ValueError(f"a step holds one of {forms}, not {sorted(given)}")
        if self.operator is not None and self.operator not in EDITS:
            raise ValueError(f"there is no built-in edit {self.operator!r}")

    @classmethod
    def of(cls, step: object) -> ScriptedStep:
        """Build a step from the mapping that a script file holds.

        Raises:
            ValueError: it is not a mapping of one of the four forms.
        """
        if not isinstance(step, Mapping):
            raise ValueError(f"a step is a mapping, not {type(step).__name__}")
        unknown = sorted(map(str, step.keys() - cls.__dataclass_fields__.keys()))
        if unknown:
            raise ValueError(f"a step knows no key {', '.join(unknown)}")
        kinds = {"parameters": Mapping, "copy": bool}
        for key, value in step.items():
            if not isinstance(value, kinds.get(key, str)):
                raise ValueError(f"{key} cannot be {value!r}")
        return cls(**step)

    @property
    def has_free_text(self) -> bool:
        return self.file is not None

    def play(self, genome: Genome) -> tuple[Genome, tuple[Edit, ...], str]:
        """Return the genome after this step, its edit if it makes one, and a summary.

        Raises:
            EditFailed: the step does not fit this genome.
        """
        if self.operator is not None:
            edit = EDITS[self.operator]
            done = edit.apply(genome, self.parameters)
            told = edit.describe(genome, self.parameters)
            return done, (edit.recorded(self.parameters),), told
        if self.file is None:
            return genome, (), "copy"
        if self.text is not None:
            new_text, told, parameters = self.text, "rewritten", {"text": self.text}
        else:
            search, replace = self.search or "", self.replace or ""
            old_text = genome.as_dict.get(self.file, "")
            new_text = replaced_once(old_text, search, replace, self.file)
            told = "search and replace"
            parameters = {"search": search, "replace": replace}
        try:
            done = genome.with_files({self.file: new_text})
        except ValueError as error:
            raise EditFailed(Reason.FORBIDDEN_PATH, f"scripted: {error}") from error
        told = f"{self.file} {told}"
        return done, (Edit("scripted", self.file, told, parameters),), told


class Scripted:
    """Plays one step per individual, over and over: `steps[request.ordinal % len(steps)]`.

    Args:
        steps: what `propose` plays.
        repairs: what `repair` plays on the failed code, chosen the same way; none mends nothing.
    """

    def __init__(
        self,
        steps: Sequence[ScriptedStep],
        repairs: Sequence[ScriptedStep] = (),
        max_drafts: int = 1,
    ) -> None:
        if not steps:
            raise ValueError("a script needs at least one step")
        self.steps = tuple(steps)
        self.repairs = tuple(repairs)
        self.max_drafts = max_drafts
        self.trusted = not any(step.has_free_text for step in (*steps, *repairs))

    @classmethod
    def from_file(cls, path: Path, max_drafts: int = 1) -> Scripted:
        """Read a script: a YAML list of steps, or a mapping with `steps` and `repairs`.

        Raises:
            ValueError: the file cannot be read or one of its steps is wrong; it names which.
        """
        import yaml

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"mutator script {path}: {error}") from error
        if isinstance(content, list):
            content = {"steps": content}
        if not isinstance(content, dict) or content.keys() - {"steps", "repairs"}:
            raise ValueError(f"mutator script {path}: expected `steps` and, if any, `repairs`")
        played: dict[str, list[ScriptedStep]] = {"steps": [], "repairs": []}
        for part, steps in content.items():
            if not isinstance(steps, list):
                raise ValueError(f"mutator script {path}: {part} is not a list")
            for number, step in enumerate(steps, start=1):
                try:
                    played[part].append(ScriptedStep.of(step))
                except ValueError as error:
                    raise ValueError(f"mutator script {path}: {part} {number}: {error}") from error
        if not played["steps"]:
            raise ValueError(f"mutator script {path}: holds no step")
        return cls(played["steps"], played["repairs"], max_drafts)

    def propose(self, request: EditRequest, rng: Random) -> Proposal:
        """Play the step of this individual on its parent's genome.

        Raises:
            EditFailed: the step does not fit this parent.
        """
        step = self.steps[request.ordinal % len(self.steps)]
        genome, new, told = step.play(request.parent.genome)
        return Proposal(genome, (*request.parent.edits, *new), len(new), told)

    def repair(
        self,
        request: EditRequest,
        failed: Proposal,
        failure: JobResult,
        rng: Random,
    ) -> Proposal:
        """Play the repair of this individual on the code that failed.

        Raises:
            EditFailed: the script holds no repair, or it does not fit the failed code.
        """
        if not self.repairs:
            raise EditFailed(Reason.NOTHING_TO_EDIT, "the script holds no repair")
        step = self.repairs[request.ordinal % len(self.repairs)]
        genome, new, told = step.play(failed.genome)
        return Proposal(genome, (*failed.edits, *new), failed.n_new + len(new), f"repair: {told}")
