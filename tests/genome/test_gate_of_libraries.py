"""Code may import a library once people approved it, and no other."""

from __future__ import annotations

import pytest

from darwin_exp.gates import objection
from darwin_exp.genome import Genome
from darwin_exp.individual import Reason

PARENT = Genome.of({"train.py": "import torch\nx = 1\n", "model.py": "y = 2\n"})
APPROVED = frozenset({"einops", "google"})


def child(line: str) -> Genome:
    return PARENT.with_files({"train.py": f"import torch\n{line}\nx = 2\n"})


@pytest.mark.parametrize(
    "line", ["import einops", "from einops.layers import torch as layers", "import google.protobuf"]
)
def test_an_approved_library_may_be_imported_and_without_the_approval_may_not(line: str) -> None:
    assert objection(child(line), PARENT, APPROVED) is None
    refused = objection(child(line), PARENT)  # the control
    assert refused is not None
    assert refused[0] is Reason.FORBIDDEN_IMPORT
    assert "which is not installed" in refused[1]


@pytest.mark.parametrize("line", ["import einops_more", "import scipy", "import googles"])
def test_g2_the_approval_of_one_library_covers_no_other(line: str) -> None:
    refused = objection(child(line), PARENT, APPROVED)
    assert refused is not None
    assert refused[0] is Reason.FORBIDDEN_IMPORT


def test_g9_no_approval_of_a_library_lets_code_reach_out() -> None:
    refused = objection(child("import socket"), PARENT, APPROVED | {"socket"})
    assert refused is not None
    assert refused[0] is Reason.FORBIDDEN_IMPORT
    assert "training code has no need of it" in refused[1]


def test_what_was_installed_from_the_start_may_still_be_imported() -> None:
    assert objection(child("import numpy"), PARENT, APPROVED) is None
