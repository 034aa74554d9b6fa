"""The images that tests of containers use, made where they are absent."""

from __future__ import annotations

import fcntl
import functools
import os
import tempfile
from pathlib import Path

import pytest

from darwin_exp.protocols import SandboxUnavailable


def base_or_skip() -> str:
    """Return the id of the image that holds a Python and no packages.

    Without an engine, skip, or fail where that is not allowed.
    """
    return _or_skip(*_make(trainer=False))


def trainer_or_skip() -> str:
    """Return the id of the image that runs use; see `base_or_skip`."""
    return _or_skip(*_make(trainer=True))


def _or_skip(image: str, obstacle: str) -> str:
    if obstacle and os.environ.get("DARWIN_REQUIRE_DOCKER") == "1":
        pytest.fail(f"DARWIN_REQUIRE_DOCKER=1, and {obstacle}")
    if obstacle:
        pytest.skip(obstacle)
    return image


@functools.cache
def _make(trainer: bool) -> tuple[str, str]:
    """Return the id of an image, or what keeps it from being made here."""
    from darwin_exp.image import ImageError, base_image, training_image

    # Of workers that find it absent, one makes it.
    place = Path(tempfile.gettempdir(), f"darwin-test-images-{os.geteuid()}.lock")
    with place.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return training_image(print)[1] if trainer else base_image(print), ""
        except (SandboxUnavailable, ImageError) as obstacle:
            print(obstacle)
            return "", str(obstacle)
