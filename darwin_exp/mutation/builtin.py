"""What a built-in edit is, and the two kinds that nearly all of them are.

To add an edit: subclass `SettingsEdit` (changes settings.json) or `CodeEdit` (changes a Python
file), give it a name, a title, a reason and a hope, and list it at the end of its module. It
is then drawn, merged, repaired, listed and tested like every other.

Reads: the genome it is given.
Writes: a new genome; the old one is never changed.
Never: the data set, trained weights, or a random number that did not come from `rng`.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from darwin_exp.individual import Edit, Genome, Reason
from darwin_exp.protocols import EditFailed

if TYPE_CHECKING:
    from darwin_exp.mutation.code import Code

SETTINGS_FILE = "settings.json"

Parameters = Mapping[str, Any]
Settings = dict[str, Any]


def does_not_apply(message: str) -> EditFailed:
    """Return the exception that says why an edit does not fit a genome."""
    return EditFailed(Reason.DOES_NOT_APPLY, message)


class BuiltInEdit(ABC):
    """One named change to training code that can be drawn, applied, and applied again elsewhere.

    Attributes:
        name: how lineages and memories refer to it; never changes once it has been used.
        file: the file it changes.
        about: what it changes; one proposal never holds two edits about the same thing.
        title: a few words for the table of individuals.
        why: one line on why it may help.
        hope: what is expected of it, in a few words.
        repeatable: whether it still means something in a lineage that already holds it.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    about: ClassVar[str]
    title: ClassVar[str]
    why: ClassVar[str]
    hope: ClassVar[str]
    repeatable: ClassVar[bool] = False

    def draw(self, genome: Genome, rng: Random) -> dict[str, Any]:
        """Draw what `apply` needs; the same genome and `rng` give the same parameters.

        Raises:
            EditFailed: it does not fit this genome.
        """
        return {}

    @abstractmethod
    def apply(self, genome: Genome, parameters: Parameters) -> Genome:
        """Return the edited genome.

        Raises:
            EditFailed: it does not fit this genome, or is there already.
        """

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        """Say in a few words what it did to `genome`."""
        return self.title

    def recorded(self, parameters: Parameters) -> Edit:
        """Return the line of a lineage from which the same edit can be made again."""
        return Edit(self.name, self.file, self.why, dict(parameters))


class SettingsEdit(BuiltInEdit):
    """Changes values of settings.json and leaves every other key as it stands."""

    file = SETTINGS_FILE

    def apply(self, genome: Genome, parameters: Parameters) -> Genome:
        settings = read_settings(genome)
        before = dict(settings)
        try:
            self.change(settings, parameters)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise does_not_apply(f"{self.name}: {SETTINGS_FILE} does not fit: {error!r}") from error
        if settings == before:
            raise does_not_apply(f"{self.name}: {SETTINGS_FILE} already says so")
        return genome.with_files({SETTINGS_FILE: json.dumps(settings, indent=2) + "\n"})

    @abstractmethod
    def change(self, settings: Settings, parameters: Parameters) -> None:
        """Change `settings` in place.

        Raises:
            EditFailed: the values leave no room for it.
            KeyError, TypeError, ValueError: a key it needs is missing or holds something else.
        """

    def describe(self, genome: Genome, parameters: Parameters) -> str:
        before = read_settings(genome)
        after = read_settings(self.apply(genome, parameters))
        changed = [
            f"{key} {_shown(before.get(key))} -> {_shown(value)}"
            for key, value in after.items()
            if before.get(key) != value
        ]
        return f"{self.title} ({', '.join(changed)})"


class CodeEdit(BuiltInEdit):
    """Rewrites one Python file, finding its parts by what they do rather than by their names."""

    def apply(self, genome: Genome, parameters: Parameters) -> Genome:
        # libcst loads a native parser, so only a process that edits code pays for it.
        from darwin_exp.mutation.code import Code

        before = genome.as_dict.get(self.file)
        if before is None:
            raise does_not_apply(f"{self.name}: the genome holds no {self.file}")
        code = Code(before, self.file)
        try:
            self.rewrite(code, parameters)
        except (KeyError, TypeError, ValueError) as error:
            raise does_not_apply(f"{self.name}: wrong parameters: {error!r}") from error
        after = code.text
        if after == before:
            raise does_not_apply(f"{self.name}: {self.file} stays as it is")
        try:
            compile(after, self.file, "exec")
        except SyntaxError as error:
            raise does_not_apply(f"{self.name}: {self.file} would not parse: {error}") from error
        return genome.with_files({self.file: after})

    @abstractmethod
    def rewrite(self, code: Code, parameters: Parameters) -> None:
        """Change `code` in place.

        Raises:
            EditFailed: the code holds no part of the kind that it changes.
            KeyError, TypeError, ValueError: the parameters are not ones that `draw` returns.
        """


def read_settings(genome: Genome) -> Settings:
    """Return the genome's settings.

    Raises:
        EditFailed: settings.json is missing or is not a JSON object.
    """
    text = genome.as_dict.get(SETTINGS_FILE)
    if text is None:
        raise does_not_apply(f"the genome holds no {SETTINGS_FILE}")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise does_not_apply(f"{SETTINGS_FILE} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise does_not_apply(f"{SETTINGS_FILE} holds no object")
    return settings


def setting_of(genome: Genome, key: str) -> Any:
    """Return one value of the genome's settings, or None where there is no such."""
    try:
        return read_settings(genome).get(key)
    except EditFailed:
        return None


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
