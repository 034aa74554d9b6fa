"""What tests of several parts share."""

from __future__ import annotations

import pytest

from tests.sandbox_image import base_or_skip, trainer_or_skip

# Here, because the process that sums up a parallel run loads no conftest.py below this one.
pytest_plugins = ["tests.attacks.tally"]


@pytest.fixture(scope="session")
def docker_image() -> str:
    """The id of an image with a Python and nothing else; see sandbox_image.py."""
    return base_or_skip()


@pytest.fixture(scope="session")
def training_image() -> str:
    """The id of the image that runs use, with torch."""
    return trainer_or_skip()
