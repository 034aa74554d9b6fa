"""A library that was approved goes into a new image, and nothing else changes there."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.conditions import Conditions
from darwin_exp.effects import Effects
from darwin_exp.hitl.inbox import Author, Inbox
from darwin_exp.hitl.requests import (
    Decision,
    Request,
    RequestType,
    answer,
    ask,
    content_of,
    fold,
)
from darwin_exp.image import (
    ImageError,
    ImageMissing,
    LibraryImage,
    LibraryRefused,
    parse_requirement,
    resolve_image,
    with_library,
)
from darwin_exp.image.library import (
    LIBRARIES,
    LIBRARY_KIND,
    STAGE,
    image_is_here,
    with_libraries,
)
from darwin_exp.image.recipe import KIND
from darwin_exp.image.store import open_store
from darwin_exp.image.wheels import fetch, refuse_intruders, unpack
from darwin_exp.individual import Genome, Individual, SandboxSpec
from darwin_exp.journal import Journal
from darwin_exp.means import Means
from darwin_exp.protocols import Launch, Limits, SandboxUnavailable, Zone
from darwin_exp.trials import Broken

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PROBE = "darwin-probe==1.0"
# Without importing it, which takes many seconds: where it comes from, and which one it is.
TORCH = """
import importlib.metadata, importlib.util
print(importlib.metadata.version("torch"), importlib.util.find_spec("torch").origin)
"""


def wheel(
    folder: Path,
    name: str,
    files: Mapping[str, str],
    version: str = "1.0",
    needs: tuple[str, ...] = (),
    entry_points: str = "",
) -> Path:
    """Write a wheel by hand, as any builder would."""
    stem = f"{name.replace('-', '_')}-{version}"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {need}" for need in needs]
    texts = {
        **files,
        f"{stem}.dist-info/METADATA": "\n".join(metadata) + "\n",
        f"{stem}.dist-info/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    if entry_points:
        texts[f"{stem}.dist-info/entry_points.txt"] = entry_points
    record = [f"{path},{digest(text)},{len(text.encode())}" for path, text in texts.items()]
    texts[f"{stem}.dist-info/RECORD"] = "\n".join([*record, f"{stem}.dist-info/RECORD,,"]) + "\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in texts.items():
            archive.writestr(zipfile.ZipInfo(member), text)  # of no date: equal calls, equal wheels
    return path


def digest(text: str) -> str:
    summed = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return f"sha256={summed.decode().rstrip('=')}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def module(name: str, answer: int = 42) -> dict[str, str]:
    return {f"{name}/__init__.py": f"ANSWER = {answer}\n", f"{name}/more.py": "MORE = 1\n"}


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let pip know of one folder, whatever this machine has told it."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    offline(monkeypatch, folder)
    return folder


class TestRequirements:
    @pytest.mark.parametrize(
        ("text", "read"),
        [
            ("einops==0.8.1", "einops==0.8.1"),
            (" Py_YAML.Extra == 6.0.1 \n", "py-yaml-extra==6.0.1"),
            ("mamba-ssm==2.2.4.post1", "mamba-ssm==2.2.4.post1"),
            ("torchcodec==0.1+cpu", "torchcodec==0.1+cpu"),
        ],
    )
    def test_one_pinned_requirement_is_read(self, text: str, read: str) -> None:
        assert str(parse_requirement(text)) == read
        assert parse_requirement(read) == parse_requirement(text)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "einops",
            "einops>=0.8",
            "einops==0.8.*",
            "einops===0.8.1",
            "einops==0.8.1,!=0.8.0",
            "einops[torch]==0.8.1",
            "einops @ https://example.org/einops.whl",
            "einops @ file:///tmp/einops.whl",
            "https://example.org/einops.whl",
            "../einops.whl",
            "einops==0.8.1; python_version > '3'",
            "einops==0.8.1 --index-url https://example.org",
            "--index-url=https://example.org",
            "-r requirements.txt",
            "einops==0.8.1\ntorch==1.0",
            "einops==0.8.1 \\\n --hash=sha256:00",
            "einops==0.8.1 torch==1.0",
            "einops==0.8.1 # fine",
            "einops==" + "1" * 200,
            "ｅinops==0.8.1",
        ],
    )
    def test_g4_anything_else_is_refused_in_one_line_with_an_example(self, text: str) -> None:
        with pytest.raises(LibraryRefused, match=r"such as einops==0\.8\.1") as refused:
            parse_requirement(text)
        assert "\n" not in str(refused.value)


class TestWheels:
    def test_what_the_image_holds_is_neither_downloaded_nor_replaced(
        self, index: Path, tmp_path: Path
    ) -> None:
        wheel(index, "darwin-probe", module("darwin_probe"), needs=("torch>=2", "darwin-part"))
        wheel(index, "darwin-part", module("darwin_part"), needs=("numpy",))
        wheel(index, "torch", module("torch"), "2.13.0")  # the index has one of that number, too
        held = {"torch": "2.13.0+cpu", "numpy": "2.4.6", "odd one": "not a version"}
        found = fetch(parse_requirement(PROBE), PYTHON, held, tmp_path / "pip", print)
        assert [path.name.partition("-")[0] for path in found] == ["darwin_part", "darwin_probe"]
        # The control: an image without torch would be given it.
        del held["torch"]
        found = fetch(parse_requirement(PROBE), PYTHON, held, tmp_path / "again", print)
        assert "torch" in {path.name.partition("-")[0] for path in found}

    def test_g4_a_library_that_needs_another_torch_is_refused_with_both_versions(
        self, index: Path, tmp_path: Path
    ) -> None:
        wheel(index, "darwin-probe", module("darwin_probe"), needs=("torch>=99",))
        wheel(index, "torch", module("torch"), "99.0")
        with pytest.raises(ImageError, match=r"depends on torch>=99") as refused:
            fetch(parse_requirement(PROBE), PYTHON, {"torch": "2.13.0"}, tmp_path / "pip", print)
        assert "the image holds torch 2.13.0;" in str(refused.value)
        assert "choose another version" in str(refused.value)
        # The control: it is the image's torch that speaks against it.
        assert fetch(parse_requirement(PROBE), PYTHON, {}, tmp_path / "again", print)

    def test_a_library_that_pip_does_not_find_is_named_with_where_to_look(
        self, index: Path, tmp_path: Path
    ) -> None:
        wheel(index, "darwin-probe", module("darwin_probe"), version="2.0")
        with pytest.raises(ImageError, match=r"no wheels of darwin-probe==1\.0 .*pip config list"):
            fetch(parse_requirement(PROBE), PYTHON, {}, tmp_path / "pip", print)

    def test_g4_no_code_of_a_source_package_runs_on_this_machine(
        self, index: Path, tmp_path: Path
    ) -> None:
        mark = tmp_path / "it-ran"
        source_package(index, f"open({str(mark)!r}, 'w').close(); raise SystemExit(3)\n")
        with pytest.raises(ImageError, match="no wheels of darwin-probe"):
            fetch(parse_requirement(PROBE), PYTHON, {}, tmp_path / "pip", print)
        assert not mark.exists()
        # The control: a pip that is not told to take wheels alone does run it.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(tmp_path)]
        subprocess.run([*command, PROBE], capture_output=True, check=False)
        assert mark.exists()

    @pytest.mark.parametrize(
        ("files", "entry_points", "problem"),
        [
            ({"torch/__init__.py": ""}, "", "it brings torch, and the image has a module torch"),
            ({"dataclasses.py": ""}, "", "it brings dataclasses.py"),
            ({"numpy.cpython-311-x86_64-linux-gnu.so": ""}, "", "a module numpy already"),
            ({"sitecustomize.py": ""}, "", "every Python would run at its start"),
            ({"usercustomize/__init__.py": ""}, "", "every Python would run at its start"),
            ({}, "[torch.backends]\nfast = darwin_probe:go\n", "hooks itself into torch.backends"),
            ({}, "[console_scripts]\ngo = darwin_probe:go\n", None),  # the controls
            ({"dataclasses_more.py": "", "lib.pth": "import os"}, "", None),
        ],
        ids=["torch", "standard", "native", "site", "user", "hook", "script", "nothing"],
    )
    def test_g4_what_would_stand_in_the_place_of_something_or_run_unasked_is_refused(
        self,
        files: dict[str, str],
        entry_points: str,
        problem: str | None,
        tmp_path: Path,
    ) -> None:
        contents = {**module("darwin_probe"), **files}
        made = wheel(tmp_path, "darwin-probe", contents, entry_points=entry_points)
        with zipfile.ZipFile(made) as archive:
            archive.extractall(tmp_path / "library")
        held = {"torch", "numpy", *sys.stdlib_module_names}
        if problem is None:
            refuse_intruders(tmp_path / "library", held)
            return
        with pytest.raises(LibraryRefused, match=problem):
            refuse_intruders(tmp_path / "library", held)

    @pytest.mark.parametrize("files", [{"darwin_probe/notes.txt": "nothing"}, {}])
    def test_what_cannot_be_imported_is_no_library(
        self, index: Path, tmp_path: Path, files: dict[str, str]
    ) -> None:
        wheel(index, "darwin-part", module("darwin_part"))
        wheel(index, "darwin-probe", files, needs=("darwin-part",))
        with pytest.raises(LibraryRefused, match="nothing that code could import"):
            fetch(parse_requirement(PROBE), PYTHON, {}, tmp_path / "pip", print)

    def test_a_wheel_is_laid_out_and_a_broken_one_is_an_error_in_one_line(
        self, tmp_path: Path
    ) -> None:
        unpack(
            [wheel(tmp_path, "darwin-probe", module("darwin_probe"))], PYTHON, tmp_path / "whole"
        )
        assert (tmp_path / "whole" / "darwin_probe" / "more.py").is_file()
        broken = tmp_path / "darwin_probe-1.0-py3-none-any.whl"
        broken.write_bytes(b"PK and no more")
        with pytest.raises(ImageError, match="cannot unpack darwin_probe-1") as failed:
            unpack([broken], PYTHON, tmp_path / "library")
        assert "\n" not in str(failed.value)


def source_package(folder: Path, backend: str) -> None:
    """Write a source package that is built by a program of its own."""
    settings = (
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "darwin-probe"\nversion = "1.0"\n'
    )
    texts = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: darwin-probe\nVersion: 1.0\n",
        "pyproject.toml": settings,
        "backend.py": backend,
    }
    with tarfile.open(folder / "darwin-probe-1.0.tar.gz", "w:gz") as archive:
        for name, text in texts.items():
            member = tarfile.TarInfo(f"darwin-probe-1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def test_without_an_engine_it_is_said_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/engine.sock")
    with pytest.raises(SandboxUnavailable, match=r"engine\.sock.*apt-get install docker\.io"):
        with_library("darwin-trainer", PROBE, print)
    with pytest.raises(SandboxUnavailable, match="apt-get install"):
        image_is_here("darwin-trainer")
    with pytest.raises(LibraryRefused):  # which needs no engine to be seen
        with_library("darwin-trainer", "einops", print)
    assert with_libraries("darwin-trainer", (), print) == ()


# --- with an engine ------------------------------------------------------------------------------


MARK = Path(tempfile.gettempdir(), "darwin-breaks-was-run")  # always the same: so are the wheels


def probe_and_part(folder: Path) -> tuple[Path, Path]:
    """Write a wheel that breaks whoever imports all of it, and one whose version is padded."""
    code = f"open({str(MARK)!r}, 'w').close()\nraise SystemExit('it ran')\n"
    files = {**module("darwin_probe"), "darwin_breaks.py": code}
    probe = wheel(
        folder, "darwin-probe", files, needs=("darwin-part==2024.1.5", "torch>=2", "numpy")
    )
    return probe, wheel(folder, "darwin-part", module("darwin_part", 7), "2024.01.05")


@pytest.fixture(scope="module")
def library(
    training_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LibraryImage]:
    """The training image and a library that needs another, torch and numpy; made once for all."""
    MARK.unlink(missing_ok=True)
    folder = tmp_path_factory.mktemp("index")
    probe_and_part(folder)
    with pytest.MonkeyPatch.context() as patch:
        offline(patch, folder)
        made = with_library(training_image, "Darwin_Probe == 1.0", print)
        yield made
    forget(made.image)


def forget(image_id: str) -> None:
    """Remove an image with a library, and what the engine kept of its making."""
    with open_store() as store:
        found = store.find(image_id)
        assert found is not None
        for tag in found.tags:
            store._api.remove_image(tag)
            for left in store.labelled(STAGE, tag.rpartition("lib-")[2]):
                store._api.remove_image(left.id)


def said_in(image_id: str, program: str) -> str:
    with open_store() as store:
        return store.run(image_id, program)


def configuration(image_id: str) -> dict[str, Any]:
    with open_store() as store:
        config: dict[str, Any] = store._api.inspect_image(image_id)["Config"]
    return config


PROGRAM = "import darwin_probe, darwin_part.more; print(darwin_probe.ANSWER)"


class TestImageWithALibrary:
    def test_its_containers_can_import_the_library_and_those_of_the_old_image_cannot(
        self, training_image: str, library: LibraryImage
    ) -> None:
        assert library.image != training_image
        assert said_in(library.image, PROGRAM) == "42"
        with pytest.raises(ImageError, match="No module named 'darwin_probe'"):  # the control
            said_in(training_image, PROGRAM)

    def test_its_approval_is_in_force_from_the_next_generation_until_it_is_revoked(
        self, training_image: str, library: LibraryImage, tmp_path: Path
    ) -> None:
        inbox, ada = Inbox(tmp_path / "inbox.sqlite"), Author("ada", "terminal")
        content = content_of({"requirement": PROBE})
        request = Request("run", RequestType.LIBRARY, "why", "", content, "g00-i01", 0)
        ask(inbox, request)
        standing = fold(inbox.entries()).requests[request.request_id]
        answer(inbox, standing, Decision.APPROVE, ada, request.content_hash)
        journal = Journal(tmp_path)
        try:
            means = Means(tmp_path, tmp_path, image=training_image)
            effects, base = Effects(journal, means), Individual("g00-i00", 0, 0, Genome.of({}))

            def conditions(generation: int) -> Conditions:
                board = fold(inbox.entries())
                return effects.carry_out(generation, board, [base], {}, 2).conditions

            assert conditions(1).image == library.image
            assert "darwin_probe" in conditions(1).libraries
            assert conditions(1).sandbox(SandboxSpec("docker", image="own")).image == library.image
            effects.verify(conditions(1))
            with pytest.raises(Broken, match="no longer has sha256:0000"):
                effects.verify(Conditions(image=f"sha256:{'0' * 64}"))
            inbox.append("revoked", {"request_id": request.request_id, "note": ""}, ada)
            assert conditions(2) == Conditions()
            (effect,) = journal.of_kind("effect")
            assert "with it came darwin-part==" in effect.payload["message"]
        finally:
            journal.close()

    def test_a_candidate_in_the_sandbox_can_import_it(
        self, training_image: str, library: LibraryImage
    ) -> None:
        from darwin_exp.sandbox.docker import DockerSandbox

        for image, answered in ((library.image, True), (training_image, False)):
            sandbox = DockerSandbox(0, (0,), SandboxSpec("docker", image=image), modules=())
            try:
                genome = Genome.of({"train.py": PROGRAM, "model.py": ""})
                limits = Limits()
                started = sandbox.start(Launch("test", Zone.TRAIN, genome, {}, {}, limits, {}))
                assert started.wait(30)
                text, _ = started.log()
                assert ("42" in text.split()) is answered, text
                assert ("No module named 'darwin_probe'" in text) is not answered
            finally:
                sandbox.close()

    def test_torch_is_the_same_in_both(self, training_image: str, library: LibraryImage) -> None:
        before, after = said_in(training_image, TORCH), said_in(library.image, TORCH)
        assert before == after
        assert before.split()[1].endswith("torch/__init__.py")

    def test_user_entry_point_and_environment_stay(
        self, training_image: str, library: LibraryImage
    ) -> None:
        before, after = configuration(training_image), configuration(library.image)
        for key in ("User", "Entrypoint", "Cmd", "Env", "WorkingDir", "Volumes"):
            assert after.get(key) == before.get(key), key
        assert after["User"] == "65532:65532"

    def test_g4_it_says_by_name_and_content_what_came_into_the_image_and_what_code_imports(
        self, library: LibraryImage, tmp_path: Path
    ) -> None:
        assert library.requirement == PROBE
        assert library.import_names == ("darwin_breaks", "darwin_probe")
        probe, part = map(sha256, probe_and_part(tmp_path))  # again, to the byte
        assert library.packages == (
            f"darwin-part==2024.1.5 sha256:{part}",
            f"darwin-probe==1.0 sha256:{probe}",
        )

    def test_its_modules_are_compiled_because_candidates_cannot_write_beside_them(
        self, library: LibraryImage
    ) -> None:
        program = "import darwin_probe as d, os; print(os.path.exists(d.__cached__))"
        assert said_in(library.image, program) == "True"

    def test_g4_it_is_made_once_whatever_the_index_holds_by_then(
        self, training_image: str, library: LibraryImage, index: Path
    ) -> None:
        wheel(index, "darwin-probe", module("darwin_probe", 13))  # of the same number, and another
        said: list[str] = []
        assert with_library(training_image, PROBE, said.append) == library
        assert said == []
        assert image_is_here(library.image)
        assert not image_is_here(f"sha256:{'0' * 64}")

    def test_g4_its_code_is_not_run_to_install_it(self, library: LibraryImage) -> None:
        assert not MARK.exists()
        with pytest.raises(ImageError, match="it ran"):  # the control: it breaks whoever runs it
            said_in(library.image, "import darwin_breaks")

    def test_it_is_labelled_and_not_taken_for_what_make_image_made(
        self, training_image: str, library: LibraryImage
    ) -> None:
        with open_store() as store:
            found = store.find(library.image)
        assert found is not None
        assert found.labels[KIND] == LIBRARY_KIND
        assert found.labels[LIBRARIES] == PROBE
        assert found.tags[0].startswith("darwin-trainer:lib-")
        assert resolve_image()[1] == training_image

    def test_libraries_go_on_top_of_each_other_in_their_order(
        self, training_image: str, library: LibraryImage, index: Path
    ) -> None:
        needs = ("darwin-probe>=0.5",)  # which the image holds by now
        second = wheel(index, "darwin-second", module("darwin_second", 8), needs=needs)
        first, both = with_libraries(training_image, (PROBE, "darwin-second==1.0"), print)
        try:
            assert first == library
            program = "import darwin_probe, darwin_second; print(darwin_second.ANSWER)"
            assert said_in(both.image, program) == "8"
            assert both.packages == (f"darwin-second==1.0 sha256:{sha256(second)}",)
            with open_store() as store:
                found = store.find(both.image)
            assert found is not None
            assert found.labels[LIBRARIES] == f"{PROBE}, darwin-second==1.0"
        finally:
            forget(both.image)

    def test_what_the_image_holds_needs_no_new_one_and_another_version_is_refused(
        self, training_image: str, index: Path
    ) -> None:
        assert not list(index.iterdir())
        program = "import importlib.metadata as m, json; print(json.dumps(m.version('numpy')))"
        held = json.loads(said_in(training_image, program))
        same = with_library(training_image, f"numpy=={held}", print)
        assert (same.image, same.packages) == (training_image, ())
        assert same.import_names == ("numpy",)
        with pytest.raises(LibraryRefused, match=rf"the image holds numpy {held}.*never replaced"):
            with_library(training_image, "numpy==1.0", print)

    def test_g4_a_library_that_would_replace_torch_makes_no_image(
        self, training_image: str, index: Path
    ) -> None:
        wheel(index, "darwin-other", {**module("darwin_other"), "torch/__init__.py": "x = 1\n"})
        said: list[str] = []
        with pytest.raises(LibraryRefused, match=r"darwin-other==1\.0: it brings torch"):
            with_library(training_image, "darwin-other==1.0", said.append)
        assert not [line for line in said if "building" in line]


@pytest.mark.usefixtures("docker_image")
def test_an_image_that_is_not_here_is_an_error_with_its_cure() -> None:
    with pytest.raises(ImageMissing, match="no image darwin-nothing:1; run `make image`"):
        with_library("darwin-nothing:1", PROBE, print)
