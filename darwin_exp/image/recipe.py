"""What an image is made from: equal recipes have equal tags, and each input changes the tag.

Reads: docker/Dockerfile, constraints.txt.
Writes: nothing.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
DOCKERFILE = CHECKOUT / "docker" / "Dockerfile"
CONSTRAINTS = CHECKOUT / "constraints.txt"

BASE = "darwin-base"
TRAINER = "darwin-trainer"
DEFAULT_BASE = "python:3.11-slim"
PACKAGES = ("torch", "numpy", "safetensors")

_LABEL = "darwin.image."  # containers inherit an image's labels, and have others of their own
KIND = f"{_LABEL}kind"
BASE_NAME = f"{_LABEL}base"
_FOUNDATION = f"{_LABEL}foundation"
COMPILER = f"{_LABEL}compiler"


class ImageError(Exception):
    """An image cannot be made or used; one line says why, and the cure."""


class ImageMissing(ImageError):
    """The engine does not have the image that was asked for."""


@dataclass(frozen=True)
class Recipe:
    """The inputs of an image.

    Attributes:
        dockerfile: its text.
        foundation: id of the image that the Dockerfile begins with.
        architecture: of the machine, such as x86_64.
        packages: pinned requirements, such as "torch==2.13.0"; none in a bare base.
        compiler: whether a C++ compiler and Python's headers are part of it.
    """

    dockerfile: str
    foundation: str
    architecture: str
    packages: tuple[str, ...] = ()
    compiler: bool = False

    @property
    def kind(self) -> str:
        """Return the repository of its tag."""
        return TRAINER if self.packages else BASE

    @property
    def tag(self) -> str:
        """Return its name in the engine's store."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.kind}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def bare(self) -> Recipe:
        """Return the recipe of the base that it stands on."""
        return replace(self, packages=(), compiler=False)

    def labels(self, base_name: str) -> dict[str, str]:
        """Return what is written on the image, so that `tag_today` can judge it later."""
        return {
            KIND: self.kind,
            BASE_NAME: base_name,
            _FOUNDATION: self.foundation,
            COMPILER: "yes" if self.compiler else "no",
        }


def training_recipe(foundation: str, compiler: bool) -> Recipe:
    """Return the recipe of the training image, as this checkout and machine have it.

    Raises:
        ImageError: docker/Dockerfile or constraints.txt cannot be used.
    """
    return Recipe(
        dockerfile=_read(DOCKERFILE),
        foundation=foundation,
        architecture=platform.machine(),
        packages=pins(_read(CONSTRAINTS)),
        compiler=compiler,
    )


def tag_today(labels: Mapping[str, str]) -> str:
    """Return the tag that a training image with these labels would get if it were made now."""
    return training_recipe(labels.get(_FOUNDATION, ""), labels.get(COMPILER) == "yes").tag


def pins(constraints: str) -> tuple[str, ...]:
    """Return the image's packages as constraints.txt pins them, in an order of their own.

    Raises:
        ImageError: one of them is not pinned.
    """
    found = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s#;]+)", constraints, re.MULTILINE))
    missing = [name for name in PACKAGES if name not in found]
    if missing:
        raise ImageError(
            f"constraints.txt: it does not pin {missing[0]}, which the image needs; add a line "
            f"such as {missing[0]}==VERSION"
        )
    return tuple(f"{name}=={found[name]}" for name in PACKAGES)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: {error}; images are made from a checkout") from error
