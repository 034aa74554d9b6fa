"""Makes the images that candidates run in, where they are not made already.

Reads: docker/Dockerfile, constraints.txt, a base image, the package index that pip is set up with.
Writes: images of the container engine; temporary folders, removed again.
Never: puts code of the harness, data or anything of a run into an image.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from darwin_exp.image import debian
from darwin_exp.image.recipe import DEFAULT_BASE, ImageError, Recipe, training_recipe
from darwin_exp.image.store import Announce, Image, Store, one_line, open_store, packed

OLDEST_PYTHON = (3, 11)  # that the pinned packages are made for
_PYTHON_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"


@dataclass(frozen=True)
class _Foundation:
    """The image that the Dockerfile begins with.

    Attributes:
        complete: it brings all that is installed from outside, so that no step needs a network.
    """

    name: str
    id: str
    complete: bool


def base_image(
    announce: Announce, *, base: str | None = None, compiler: bool = True, force: bool = False
) -> str:
    """Return the id of the base image, which holds a Python and no packages, and make it if needed.

    Args:
        announce: is told what happens, a line each; nothing where the image is there.
        base: the image to begin with; None takes BASE_IMAGE from the environment, or else
            python:3.11-slim, or else what debootstrap makes. "debootstrap" asks for that.
        compiler: whether debootstrap adds what the training image needs of a compiler.
        force: build it again though it is there.

    Raises:
        SandboxUnavailable: no engine answers.
        ImageError: it cannot be made here.
    """
    with open_store() as store:
        foundation = _foundation(store, base, compiler, announce)
        recipe = training_recipe(foundation.id, compiler)
        return _build(store, recipe.bare, foundation, force, announce).id


def training_image(
    announce: Announce, *, base: str | None = None, compiler: bool = True, force: bool = False
) -> tuple[str, str]:
    """Return tag and id of the training image, and make it if needed.

    Args and errors are those of `base_image`; `compiler` tells whether it gets a C++ compiler.
    """
    with open_store() as store:
        foundation = _foundation(store, base, compiler, announce)
        recipe = training_recipe(foundation.id, compiler)
        return recipe.tag, _build(store, recipe, foundation, force, announce).id


def _foundation(store: Store, base: str | None, compiler: bool, announce: Announce) -> _Foundation:
    """Find the image to begin with: here, in its registry, or from Debian's packages."""
    named = base or os.environ.get("BASE_IMAGE") or None
    if named == debian.NAME:
        return _debian(store, compiler, announce)
    name = named or DEFAULT_BASE
    here = store.find(name)
    if here is None and named is None and store.find(debian.tag(compiler)) is not None:
        return _debian(store, compiler, announce)  # as before, without asking a registry again
    if here is None:
        announce(f"pulling {name}")
        try:
            here = store.pull(name)
        except ImageError as failure:
            if named is not None:  # what was named is never replaced
                raise ImageError(
                    f"the base image {name} cannot be pulled ({failure}); mend its name or the way "
                    "to its registry, or bring it with `docker load`"
                ) from failure
            announce(f"{name} cannot be pulled: {failure}")
            return _debian(store, compiler, announce)
    return _Foundation(name, here.id, complete=False)


def _debian(store: Store, compiler: bool, announce: Announce) -> _Foundation:
    made = store.find(debian.tag(compiler))
    if made is None:
        obstacle = debian.obstacle()
        if obstacle is not None:
            raise ImageError(
                f"a base image without a registry is made by debootstrap, which needs {obstacle}; "
                "or name one that can be had with BASE_IMAGE"
            )
        made = debian.make(store, compiler, announce)
    return _Foundation(debian.NAME, made.id, complete=True)


def _build(
    store: Store, recipe: Recipe, foundation: _Foundation, force: bool, announce: Announce
) -> Image:
    """Return the image of a recipe; build it where it is missing, or by force."""
    made = store.find(recipe.tag)
    if made is not None and not force:
        return made
    python = ""
    if recipe.packages:
        below = _build(store, recipe.bare, foundation, force, announce)
        python = _python_of(store, below, foundation)
    with tempfile.TemporaryDirectory(
        prefix="darwin-image-", dir=debian.scratch_folder()
    ) as scratch:
        context = Path(scratch) / "context"
        context.mkdir()
        (context / "Dockerfile").write_text(recipe.dockerfile, encoding="utf-8")
        arguments = {"BASE_IMAGE": recipe.foundation}
        if recipe.packages:
            _install(recipe.packages, python, context / "site", announce)
            arguments["COMPILER"] = "yes" if recipe.compiler else "no"
        announce(f"building {recipe.tag} on {foundation.name}")
        return store.build(
            # Whoever unpacks it is root inside, and candidates are not: all must be readable.
            packed(context, "--owner=0", "--group=0", "--mode=a+rX,go-w"),
            recipe.tag,
            target="trainer" if recipe.packages else "base",
            arguments=arguments,
            labels=recipe.labels(foundation.name),
            network="none" if foundation.complete else "default",
            fresh=force,
            announce=announce,
        )


def _python_of(store: Store, base: Image, foundation: _Foundation) -> str:
    """Return the version of the image's Python, such as 3.11."""
    version = store.run(base.id, _PYTHON_VERSION)
    try:
        numbers = tuple(int(part) for part in version.split("."))
    except ValueError as error:
        raise ImageError(
            f"{foundation.name}: its python3 says {one_line(version)!r} when asked for its "
            "version; choose another BASE_IMAGE"
        ) from error
    if numbers < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        raise ImageError(
            f"{foundation.name}: its Python is {version}, and the packages that constraints.txt "
            f"pins need {oldest} or newer; choose a BASE_IMAGE of Debian 12, Ubuntu 24.04 or later"
        )
    return version


def _install(packages: tuple[str, ...], python: str, site: Path, announce: Announce) -> None:
    """Let this machine's pip, with its index and its cache, gather packages for another Python."""
    announce(f"pip: {' '.join(packages)} for Python {python}, which may take minutes")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-compile", "--only-binary=:all:", "--python-version", python]
    done = subprocess.run(
        [*command, "--target", str(site), *packages],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no reason given"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
        raise ImageError(
            f"pip cannot get {' '.join(packages)} for Python {python}: "
            f"{one_line((errors or lines)[-1])}; look at its index (pip config list), or choose a "
            "BASE_IMAGE with another Python"
        )
