"""Which sandbox promises what, and the boxes in which the tests try it.

Tests are named by the catalogue's ids: `test_a4_...` is run in every sandbox that promises A4, by
the table below; `test_control_a4_...` switches the defence off and shows that the attack succeeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.attacks.boxes")

from darwin_exp.individual import DataSpec  # noqa: E402
from darwin_exp.protocols import SandboxUnavailable  # noqa: E402
from tests.attacks import tally  # noqa: E402
from tests.attacks.boxes import CANARY, ZOO, Box, build, torch_train, write_data  # noqa: E402
from tests.attacks.outside import Engine  # noqa: E402

KINDS = ("process", "bubblewrap", "docker")


@dataclass(frozen=True)
class Promise:
    """Which sandboxes withstand a case.

    Attributes:
        kinds: those that do.
        otherwise: why the others do not; empty where all do.
        as_root: whether the process sandbox does so only where the harness is root and may make
            mount namespaces.
    """

    kinds: tuple[str, ...] = KINDS
    otherwise: str = ""
    as_root: bool = False


_ALL = Promise()
_AS_ROOT = Promise(as_root=True)
_SIZE_OF_ALL = Promise(("docker",), "the others bound the size of a file, not of all files")
_IMAGE = Promise(("docker",), "the others start nothing from an image")

PROMISES: dict[str, Promise] = {
    **{f"A{n}": _ALL for n in range(1, 21)},
    **{f"B{n}": _ALL for n in range(1, 30)},
    **{f"C{n}": _ALL for n in range(1, 10)},
    **dict.fromkeys(("A1", "A8", "A13", "A15", "B12", "B14", "B28"), _AS_ROOT),
    **dict.fromkeys(("A10", "A11"), _SIZE_OF_ALL),
    "A14": Promise(("bubblewrap", "docker"), "it leaves user namespaces to the kernel's policy"),
    "A16": Promise(("docker",), "the others show every device of the machine"),
    "A17": Promise(("docker",), "the others do not count files in memory that nobody maps"),
    **dict.fromkeys(("A18", "A19", "A20"), _IMAGE),
}
# Real models with real torch take seconds each in a container, so one of them goes there.
TORCH_IN_DOCKER = ("B7",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    case = tally.case_of(metafunc.function.__name__)
    if case is not None and "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", PROMISES[case].kinds)
    if case is not None and "torch_kind" in metafunc.fixturenames:
        kinds = ("process", "docker") if case in TORCH_IN_DOCKER else ("process",)
        metafunc.parametrize("torch_kind", kinds)


@pytest.fixture(scope="session")
def promises() -> dict[str, Promise]:
    return PROMISES


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    return write_data(tmp_path_factory.mktemp("prepared") / "circle")


@pytest.fixture(scope="session")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the harness that holds what nobody else may read."""
    path = tmp_path_factory.mktemp("home") / "api_key"
    path.write_text(f'{{"api_key": "{CANARY}"}}', encoding="utf-8")
    path.chmod(0o600)
    return path


GetBox = Callable[[str, str, bool], Box]


@pytest.fixture(scope="session")
def boxes(data: DataSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GetBox]:
    """Return a function that makes the box of a kind, or returns the one that is there already."""
    made: dict[tuple[str, bool], Box] = {}
    os.environ["DARWIN_TEST_API_KEY"] = CANARY  # in place before any sandbox is started

    def get(kind: str, image: str, torch: bool) -> Box:
        if (kind, torch) not in made:
            try:
                sandbox = build(kind, image, hidden=(data.folder,), torch=torch)
            except SandboxUnavailable as obstacle:
                if kind == "docker":  # there is an engine with this image, so it has to work
                    raise
                pytest.skip(str(obstacle))
            folder = tmp_path_factory.mktemp(f"jobs-{kind}")
            engine = Engine() if kind == "docker" else None
            if torch:
                honest = (torch_train("attention"), ZOO.read_text(encoding="utf-8"))
                limits: dict[str, Any] = {"memory_mb": 4096, "file_mb": 64, "max_processes": 256}
                box = Box(
                    kind, sandbox, data, folder, honest=honest, engine=engine, image=image, **limits
                )
            else:
                box = Box(kind, sandbox, data, folder, engine=engine, image=image)
            made[kind, torch] = box
        return made[kind, torch]

    yield get
    for box in made.values():
        box.close()
    os.environ.pop("DARWIN_TEST_API_KEY", None)  # tests of other parts set and remove it, too


@pytest.fixture
def box(kind: str, boxes: GetBox, request: pytest.FixtureRequest) -> Box:
    """The box of a kind, for attacks with the fake trainer."""
    image = str(request.getfixturevalue("docker_image")) if kind == "docker" else ""
    found = boxes(kind, image, False)
    case = tally.case_of(request.node.name)
    if kind == "process" and case is not None and PROMISES[case].as_root:
        _skip_unless_housed(found)
    return found


@pytest.fixture
def torch_box(torch_kind: str, boxes: GetBox, request: pytest.FixtureRequest) -> Box:
    """The box of a kind, for attacks with real models."""
    image = str(request.getfixturevalue("training_image")) if torch_kind == "docker" else ""
    return boxes(torch_kind, image, True)


@pytest.fixture
def process_box(boxes: GetBox) -> Box:
    """The box in which controls are tried: the quickest one."""
    return boxes("process", "", False)


def _skip_unless_housed(box: Box) -> None:
    if not getattr(box.sandbox, "isolated", False):
        pytest.skip("the process sandbox promises it only as root that may make mount namespaces")
