"""Wheels for a library that an image shall hold besides what it holds already.

Reads: the package index that pip is set up with.
Writes: the folders that it is given.
Never: runs code of a wheel, takes anything but wheels, or replaces what the image holds.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from darwin_exp.image.recipe import ImageError
from darwin_exp.image.store import Announce, one_line

PIP_SECONDS = 1800.0
MOST_CHARACTERS = 200  # of a requirement
# Python imports them by itself when it starts, before any code of ours.
_AT_START = frozenset({"sitecustomize", "usercustomize"})
# Torch and Triton load what registers itself in groups of theirs: torch does when it is imported.
_HOOKED = ("torch", "triton")
_CONSTRAINT = re.compile(r"The user requested \(constraint\) (\S+)")


class LibraryRefused(ImageError):
    """A library does not go into an image: of what is asked for, or of what it would do there."""


@dataclass(frozen=True)
class Requirement:
    """Exactly one version of one package.

    Attributes:
        name: as package indexes compare it: in lower case, with hyphens.
    """

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def parse_requirement(text: str) -> Requirement:
    """Read a pinned requirement such as "einops==0.8.1".

    Raises:
        LibraryRefused: it is anything else, such as a range, an address, an option or two of them.
    """
    from packaging.requirements import InvalidRequirement
    from packaging.requirements import Requirement as Parsed
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    wanted = "write one pinned requirement, such as einops==0.8.1"
    shown = repr(one_line(text, 80))
    if len(text) > MOST_CHARACTERS or len(text.strip().splitlines()) != 1:
        raise LibraryRefused(f"{shown} is not one line with one requirement; {wanted}")
    try:
        parsed = Parsed(text.strip())
    except InvalidRequirement as error:
        raise LibraryRefused(f"{shown} is no requirement; {wanted}") from error
    for present, what in (
        (parsed.url, "an address"),
        (parsed.extras, "extras"),
        (parsed.marker, "a condition"),
    ):
        if present:
            raise LibraryRefused(f"{shown} has {what}; {wanted}")
    versions = list(parsed.specifier)
    if len(versions) != 1 or versions[0].operator != "==":
        raise LibraryRefused(f"{shown} does not name exactly one version; {wanted}")
    try:
        version = Version(versions[0].version)
    except InvalidVersion as error:  # 1.2.*
        raise LibraryRefused(f"{shown} does not name exactly one version; {wanted}") from error
    return Requirement(canonicalize_name(parsed.name), str(version))


def satisfies(requirement: Requirement, version: str) -> bool:
    """Say whether an installed version, such as 2.13.0+cpu, is the one that is asked for."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(f"=={requirement.version}").contains(version, prereleases=True)


def fetch(
    requirement: Requirement,
    python: str,
    installed: Mapping[str, str],
    folder: Path,
    announce: Announce,
) -> tuple[Path, ...]:
    """Download the wheels of a library and of what it needs that is not installed.

    To pip, everything installed is a package of that one version from an empty wheel of ours: so
    it is neither downloaded nor replaced, and a library that needs another version is refused.

    Args:
        python: version of the image's Python, such as 3.11.
        installed: name and version of what the image holds.
        folder: where to put them; it is made.

    Raises:
        LibraryRefused: the library holds nothing to import.
        ImageError: pip finds none that fit, or does not come to an end.
    """
    from packaging.utils import parse_wheel_filename

    announce(f"pip: {requirement} for Python {python}, which may take minutes")
    folder.mkdir()
    constraints, stand_ins = folder / "constraints.txt", folder / "installed"
    stand_ins.mkdir()
    held = [_stand_in(name, version, stand_ins) for name, version in sorted(installed.items())]
    lines = [f"{path.name.partition('-')[0]} @ {path.as_uri()}" for path in held if path]
    constraints.write_text("\n".join(lines) + "\n", encoding="utf-8")
    place = folder / "wheels"
    try:
        _pip("download", python, f"--constraint={constraints}", f"--dest={place}", str(requirement))
    except ImageError as failure:
        reason = _CONSTRAINT.sub(lambda told: _held(told[1], installed), str(failure))
        raise ImageError(
            f"pip finds no wheels of {requirement} that go with Python {python} and what the image "
            f"holds: {reason}; choose another version, or look at pip's index (pip config list)"
        ) from failure
    known = {path.name for path in held if path}
    found = tuple(sorted(path for path in place.iterdir() if path.name not in known))
    for path in found:
        if parse_wheel_filename(path.name)[0] == requirement.name:
            _refuse_nothing(path, requirement)
            return found
    raise ImageError(f"pip brought no wheel of {requirement}; look at its index (pip config list)")


def unpack(wheels: Sequence[Path], python: str, folder: Path) -> None:
    """Lay out wheels as an installation, on this machine, where no code of theirs is run.

    Raises:
        ImageError: one of them is broken.
    """
    try:
        alone = ("--no-index", "--no-deps", "--no-compile")
        _pip("install", python, *alone, f"--target={folder}", *map(str, wheels))
    except ImageError as failure:
        names = ", ".join(path.name for path in wheels)
        raise ImageError(f"pip cannot unpack {names}: {failure}; choose another version") from (
            failure
        )


def refuse_intruders(folder: Path, held: Collection[str]) -> None:
    """Check that what was unpacked only adds to what a Python finds, and starts nothing itself.

    Args:
        held: names of the modules that the image's Python has, torch's among them.

    Raises:
        LibraryRefused: it has a module of such a name, or one that would run unasked.
    """
    for path in sorted(folder.iterdir()):
        name = path.name.partition(".")[0]
        if path.suffix == ".dist-info":
            continue
        if name in _AT_START:
            raise LibraryRefused(
                f"it brings {path.name}, which every Python would run at its start"
            )
        if name in held:
            raise LibraryRefused(
                f"it brings {path.name}, and the image has a module {name} already, which is never "
                "replaced"
            )
    for package in importlib.metadata.distributions(path=[str(folder)]):
        for entry in package.entry_points:
            if entry.group.startswith(_HOOKED):
                raise LibraryRefused(
                    f"{package.metadata['Name']} hooks itself into {entry.group}, which would "
                    "change what the image holds"
                )


def _refuse_nothing(wheel: Path, requirement: Requirement) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise ImageError(f"{wheel.name} is no wheel: {error}; choose another version") from error
    if not any(inspect.getmodulename(PurePosixPath(name).name) for name in names):
        raise LibraryRefused(f"{requirement} holds nothing that code could import")


def _held(name: str, installed: Mapping[str, str]) -> str:
    key = name.rstrip(";").replace("_", "-")
    return f"the image holds {key} {installed.get(key, '')}".rstrip()


def _stand_in(name: str, version: str, folder: Path) -> Path | None:
    """Write an empty wheel of a package; None for what is not named or numbered as packages are."""
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version

    try:
        stem = f"{canonicalize_name(name, validate=True).replace('-', '_')}-{Version(version)}"
    except (InvalidVersion, ValueError):
        return None
    path = folder / f"{stem}-py3-none-any.whl"
    texts = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for member, text in texts.items():
            wheel.writestr(f"{stem}.dist-info/{member}", text)
    return path


def _pip(subcommand: str, python: str, *arguments: str) -> None:
    """Run this machine's pip, with its index and its cache, for another Python.

    Raises:
        ImageError: it failed, with its own reason in one line, or is still busy after long.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", subcommand]
    command += ["--progress-bar=off", "--only-binary=:all:", f"--python-version={python}"]
    try:
        done = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=PIP_SECONDS,
            env={**os.environ, "PIP_QUIET": "0"},  # or it leaves out why versions do not agree
        )
    except subprocess.TimeoutExpired as error:
        raise ImageError(f"pip is still busy after {PIP_SECONDS / 60:.0f} minutes") from error
    if done.returncode != 0:
        raise ImageError(_reason(done.stdout))


def _reason(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()] or ["no reason given"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    for number, line in enumerate(lines):
        if line.startswith("The conflict is caused by"):
            return one_line("; ".join(lines[number + 1 : number + 3]))
    return one_line((errors or lines[-1:])[0])
