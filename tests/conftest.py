"""What tests of several parts share."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.sandbox_image import base_or_skip, trainer_or_skip

# How long an example takes is no property of the code: the first one may import torch.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")

# Here, because the process that sums up a parallel run loads no conftest.py below this one.
pytest_plugins = ["tests.attacks.tally"]


# What takes minutes has a target of its own: `make test-edits`, `make test-integrity`, ...
OWN_TARGETS = ("edits", "integrity", "kills")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what has a target of its own, unless `-m` names it."""
    unasked = [name for name in OWN_TARGETS if name not in config.getoption("markexpr")]
    left_out = {item for item in items if any(map(item.get_closest_marker, unasked))}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def docker_image() -> str:
    """The id of an image with a Python and nothing else; see sandbox_image.py."""
    return base_or_skip()


@pytest.fixture(scope="session")
def training_image() -> str:
    """The id of the image that runs use, with torch."""
    return trainer_or_skip()
