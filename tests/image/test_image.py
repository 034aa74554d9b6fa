"""The image: its tag is its recipe, no run pulls one, and what is missing is one clear line."""

from __future__ import annotations

import io
import os
import socket
import socketserver
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from docker.api import APIClient
from docker.errors import DockerException
from docker.utils import kwargs_from_env

import darwin_exp.sandbox.engine  # noqa: F401  (while this process may still read it)
from darwin_exp import config, containment, schema
from darwin_exp.config import PROJECT, ConfigError
from darwin_exp.image import (
    ImageError,
    ImageMissing,
    base_image,
    debian,
    making,
    recipe,
    resolve_image,
    training_image,
)
from darwin_exp.image.__main__ import main
from darwin_exp.image.recipe import BASE_NAME, COMPILER, Recipe, pins, tag_today, training_recipe
from darwin_exp.image.store import open_store, packed
from darwin_exp.protocols import SandboxUnavailable

NOBODY = 65_534
CANDIDATE = "65532:65532"
RECIPE = Recipe(
    "FROM scratch\n", "sha256:0a", "x86_64", ("torch==2.1", "numpy==2.0", "safetensors==1.0"), True
)
PINS = "torch==2.1  # trains\nnumpy==2.0\nsafetensors==1.0 # weights\n"


class TestTags:
    @pytest.mark.parametrize(
        "change",
        [
            {"dockerfile": "FROM scratch\nUSER 1\n"},
            {"foundation": "sha256:0b"},
            {"architecture": "aarch64"},
            {"packages": ("torch==2.2", "numpy==2.0", "safetensors==1.0")},
            {"compiler": False},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_each_input_changes_the_tag(self, change: dict[str, Any]) -> None:
        assert replace(RECIPE, **change).tag != RECIPE.tag

    def test_only_the_pins_of_what_is_in_the_image_count(self) -> None:
        other = "# note\nhydra-core==9.9\nsafetensors==1.0\npytest==1.0\nnumpy==2.0\ntorch==2.1\n"
        assert pins(other) == pins(PINS) == RECIPE.packages
        assert replace(RECIPE, packages=pins(other)).tag == RECIPE.tag
        assert pins(PINS.replace("numpy==2.0", "numpy==2.0.1")) != RECIPE.packages

    def test_a_base_depends_on_neither_packages_nor_compiler(self) -> None:
        other = replace(RECIPE, packages=("torch==9.9",), compiler=False)
        assert other.bare.tag == RECIPE.bare.tag
        assert RECIPE.bare.tag.startswith("darwin-base:")
        assert RECIPE.tag.startswith("darwin-trainer:")

    def test_a_package_that_is_not_pinned_is_named_with_its_file(self) -> None:
        with pytest.raises(ImageError, match=r"constraints\.txt: it does not pin numpy"):
            pins("torch==2.1\nsafetensors==1.0\n# numpy==2.0\n")

    @pytest.mark.parametrize("compiler", [True, False])
    def test_labels_tell_whether_an_image_would_be_made_the_same_way_today(
        self, compiler: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = training_recipe("sha256:0a", compiler)
        labels = made.labels("python:3.11-slim")
        assert tag_today(labels) == made.tag
        changed = tmp_path / "Dockerfile"
        changed.write_text(made.dockerfile + "USER 1\n")
        monkeypatch.setattr(recipe, "DOCKERFILE", changed)
        assert tag_today(labels) != made.tag


SOMEBODY_ELSES = """\
deb [signed-by=/x.gpg] https://tools.example/linux/debian bookworm stable
deb https://cloud.example/apt tools-bookworm main
"""
STANZAS = """\
# Debian's own, as its installer writes it
Types: deb
# a comment within
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""


class TestBaseFromPackages:
    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({"debian.sources": STANZAS, "a.list": SOMEBODY_ELSES}, "http://mirror.example/debian"),
            (
                {"a.list": "deb [arch=amd64] https://m.example/debian/ bookworm main contrib\n"},
                "https://m.example/debian/",
            ),
            ({"debian.sources": "Enabled: no\n" + STANZAS.partition("\n")[2]}, None),
            ({"a.list": "# deb http://m.example/debian bookworm main\n" + SOMEBODY_ELSES}, None),
            ({}, None),
        ],
        ids=["stanzas", "one line", "switched off", "comments and others", "nothing"],
    )
    def test_its_mirror_is_the_one_that_apt_uses(
        self, files: dict[str, str], expected: str | None, tmp_path: Path
    ) -> None:
        parts = tmp_path / "apt" / "sources.list.d"
        parts.mkdir(parents=True)
        for name, text in files.items():
            (parts / name).write_text(text)
        assert debian.mirror(tmp_path) == expected

    def test_without_debootstrap_it_says_how_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(debian, "_ADMIN_FOLDERS", "/nowhere")
        assert "apt-get install debootstrap" in str(debian.obstacle())


class TestPacking:
    def test_everyone_in_an_image_can_read_what_only_we_could(self, tmp_path: Path) -> None:
        private = tmp_path / "context" / "site" / "torch"
        private.mkdir(parents=True, mode=0o700)
        (private / "weights.py").write_text("x = 1\n")
        (private / "weights.py").chmod(0o600)
        members = unpacked(packed(tmp_path / "context", "--owner=0", "--mode=a+rX,go-w"))
        assert members["./site/torch/weights.py"].mode & 0o777 == 0o644
        assert members["./site/torch"].mode & 0o555 == 0o555
        assert {member.uid for member in members.values()} == {0}

    def test_what_is_left_out_stays_out_and_its_folder_stays(self, tmp_path: Path) -> None:
        (tmp_path / "var" / "log").mkdir(parents=True)
        (tmp_path / "var" / "log" / "apt").write_text("installed\n")
        members = unpacked(packed(tmp_path, "--exclude=./var/log/*"))
        assert "./var/log" in members
        assert "./var/log/apt" not in members
        assert "./var/log/apt" in unpacked(packed(tmp_path))

    def test_a_folder_that_cannot_be_read_is_an_error_and_not_an_empty_image(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(ImageError, match="tar failed"):
            list(packed(tmp_path / "missing"))


def unpacked(stream: Iterator[bytes]) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as archive:
        return {member.name: member for member in archive.getmembers()}


# --- what is wrong is one line, before anything starts -------------------------------------------


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/engine.sock")


def containers(**settings: Any) -> schema.DockerConfig:
    return schema.DockerConfig(**settings)


@pytest.mark.usefixtures("no_engine")
class TestWithoutAnEngine:
    def test_it_is_said_with_what_to_install(self) -> None:
        with pytest.raises(SandboxUnavailable, match=r"engine\.sock.*apt-get install docker\.io"):
            resolve_image()

    def test_make_image_says_so_in_one_line_and_exits_with_2(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([]) == 2
        printed = capsys.readouterr()
        assert printed.err.count("\n") == 1
        assert "no container engine answers" in printed.err

    def test_a_run_in_containers_is_refused_and_not_run_elsewhere(self) -> None:
        said: list[str] = []
        with pytest.raises(ConfigError, match="sandbox=docker: no container engine answers") as no:
            containment.choose_sandbox(containers(), said.append, True, may_fall_back=True)
        assert "\n" not in str(no.value)
        assert said == []

    def test_the_command_line_exits_with_2_before_anything_is_written(self, tmp_path: Path) -> None:
        runs = tmp_path / "runs"
        command = [sys.executable, "-m", "darwin_exp", "+experiment=baseline", "sandbox=docker"]
        done = subprocess.run(
            [*command, f"paths.runs={runs}", f"paths.data={tmp_path}", f"paths.memory={tmp_path}"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.strip().count("\n") == 0
        assert "sandbox=docker: no container engine answers" in done.stderr
        assert [path for path in runs.rglob("*") if path.is_file()] == []


def test_without_permission_on_its_socket_it_says_which_group_to_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as engine:
        path = Path(folder) / "engine.sock"
        engine.bind(str(path))
        engine.listen()
        path.chmod(0)
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        child = os.fork()
        if child == 0:  # root may open any socket
            try:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setgid(NOBODY)
                    os.setuid(NOBODY)
                resolve_image()
                os._exit(1)
            except SandboxUnavailable as refused:
                os._exit(0 if "usermod -aG docker" in str(refused) else 2)
            finally:
                os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestGpus:
    def test_every_slot_has_one_of_its_own(self) -> None:
        box = containers(device="cuda")
        assert containment.assign_gpus(box, 2) == 2
        assert box.gpus == ["0", "1"]

    def test_their_number_decides_how_many_slots_there_are(self) -> None:
        box = containers(device="cuda", gpus=["GPU-5f", "3", "1"])
        assert containment.assign_gpus(box, None) == 3
        assert containment.sandbox_spec(box).gpus == ("GPU-5f", "3", "1")

    def test_more_slots_than_gpus_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"workers=2.*workers=1"):
            containment.assign_gpus(containers(device="cuda", gpus=["0"]), 2)

    def test_without_cuda_none_is_taken(self) -> None:
        box = containers()
        assert containment.assign_gpus(box, None) is None
        assert box.gpus == []


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"image": " "}, "sandbox.image is empty"),
        ({"runtime": ""}, "sandbox.runtime is empty"),
        ({"gpus": ["0"]}, "sandbox.device=cuda only"),
        ({"gpus": ["0", "0"], "device": "cuda"}, "each GPU once"),
    ],
    ids=["image", "runtime", "device", "twice"],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config._check_containers(containers(**settings))


def test_the_environment_names_image_and_runtime_where_there_are_containers_and_else_neither() -> (
    None
):
    box = containers(image="sha256:0a", runtime="runsc")
    assert containment.environment_of(box) == {
        "device": "cpu",
        "threads": 1,
        "sandbox": "docker",
        "image": "sha256:0a",
        "runtime": "runsc",
    }
    assert "image" not in containment.environment_of(schema.SandboxConfig("process"))


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--base IMAGE", "--base-only", "--force", "--no-compiler", "BASE_IMAGE"):
        assert option in shown


def test_packages_that_pip_cannot_get_are_named_with_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    with pytest.raises(ImageError, match=r"torch==0\.0\.0 for Python 3\.11: .*index") as failed:
        making._install(("torch==0.0.0",), "3.11", tmp_path / "site", said.append)
    assert "\n" not in str(failed.value)


# --- with an engine ------------------------------------------------------------------------------


@contextmanager
def engine() -> Iterator[APIClient]:
    with closing(APIClient(version="auto", timeout=120, **kwargs_from_env())) as api:
        yield api


def contained(image: str, program: str, seconds: float = 120, **options: Any) -> tuple[int, str]:
    """Run a Python program in a container without a network; return exit code and output."""
    user, environment = options.pop("user", None), options.pop("environment", None)
    with engine() as api:
        host = api.create_host_config(
            network_mode="none", log_config={"type": "json-file"}, **options
        )
        made = api.create_container(
            image,
            ["python3", "-s", "-P", "-c", program],
            host_config=host,
            user=user,
            environment=environment,
        )
        try:
            api.start(made["Id"])
            code = api.wait(made["Id"], timeout=seconds)["StatusCode"]
            return code, api.logs(made["Id"]).decode().strip()
        finally:
            api.remove_container(made["Id"], force=True)


@contextmanager
def registry() -> Iterator[tuple[str, Callable[[], int]]]:
    """Serve a registry that has nothing; yield its address, and how often somebody came."""
    visits: list[float] = []

    class Visit(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            visits.append(time.monotonic())

    with socketserver.TCPServer(("127.0.0.1", 0), Visit) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", lambda: len(visits)
        finally:
            server.shutdown()
            thread.join()


class TestResolving:
    def test_a19_an_image_that_is_not_here_is_an_error_and_is_never_pulled(
        self, docker_image: str
    ) -> None:
        began = int(time.time())
        with registry() as (address, visits), engine() as api:
            name = f"{address}/darwin/absent:1"
            with pytest.raises(ImageMissing, match="make image"):
                resolve_image(name)
            assert visits() == 0
            mark = f"darwin-test-{os.getpid()}"
            api.tag(docker_image, mark, "seen")
            api.remove_image(f"{mark}:seen")
            seen = [
                (event.get("Action"), event.get("Actor", {}).get("Attributes", {}).get("name", ""))
                for event in api.events(since=began, until=int(time.time()) + 1, decode=True)
            ]
            assert ("tag", f"{mark}:seen") in seen, "this list would not show a pull either"
            assert not [event for event in seen if event[0] == "pull" and address in event[1]]
            # The control: whoever does pull is seen.
            with open_store() as store, pytest.raises(ImageError):
                store.pull(name)
            assert visits() > 0, "this engine does not come to our door, so nothing was shown"

    @pytest.mark.parametrize("name", ["No Such Name!", "darwin-nothing", f"sha256:{'0' * 64}"])
    @pytest.mark.usefixtures("docker_image")
    def test_whatever_is_asked_for_and_is_not_here_is_told_by_its_name(self, name: str) -> None:
        with pytest.raises(ImageMissing, match=name) as missing:
            resolve_image(name)
        assert "\n" not in str(missing.value)

    def test_a_name_and_an_id_lead_to_the_same_image(self, docker_image: str) -> None:
        name, image_id = resolve_image(docker_image)
        assert image_id == docker_image
        assert name.startswith("darwin-")
        assert resolve_image(name) == (name, docker_image)

    @pytest.mark.usefixtures("docker_image")
    def test_a_base_of_which_nothing_was_made_has_no_training_image(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("BASE_IMAGE", "darwin-never-used:1")
        with pytest.raises(ImageMissing, match="on darwin-never-used:1 yet; run `make image`"):
            resolve_image()

    @pytest.mark.usefixtures("docker_image")
    def test_what_an_engine_fails_at_is_one_line_for_people(self) -> None:
        with pytest.raises(ImageError, match="the stream broke off; mend that"), open_store():
            raise DockerException("the stream\nbroke off.")

    @pytest.mark.usefixtures("docker_image")
    def test_a_run_with_an_image_that_is_missing_is_refused(self) -> None:
        box = containers(image="darwin-nothing:1")
        with pytest.raises(ConfigError, match=r"sandbox=docker: .*darwin-nothing:1"):
            containment.choose_sandbox(box, print, True, may_fall_back=True)


class TestBase:
    def test_it_is_not_made_twice(self, docker_image: str) -> None:
        said: list[str] = []
        assert base_image(said.append) == docker_image
        assert said == []

    @pytest.mark.usefixtures("docker_image")
    def test_one_that_was_named_and_cannot_be_pulled_is_not_replaced(self) -> None:
        with (
            registry() as (address, _),
            pytest.raises(ImageError, match=f"base image {address}/base:1 cannot be pulled"),
        ):
            base_image(print, base=f"{address}/base:1")

    @pytest.mark.parametrize("read_only", [True, False])
    def test_it_runs_python_without_a_network_on_a_read_only_root(
        self, docker_image: str, read_only: bool
    ) -> None:
        program = """
import os
print(os.listdir("/sys/class/net"))
try:
    open("/written", "w").close()
    print("written")
except OSError as refused:
    print(refused.strerror)
"""
        code, printed = contained(docker_image, program, read_only=read_only)
        assert code == 0
        written = "Read-only file system" if read_only else "written"  # the control
        assert printed.splitlines() == ["['lo']", written]


@pytest.fixture(scope="module")
def trainer() -> tuple[str, str]:
    try:
        return resolve_image()
    except (ImageError, SandboxUnavailable) as missing:
        if os.environ.get("DARWIN_REQUIRE_DOCKER") == "1":
            pytest.fail(str(missing))
        pytest.skip(str(missing))


class TestTrainingImage:
    def test_a_second_make_image_has_nothing_to_do(self, trainer: tuple[str, str]) -> None:
        with open_store() as store:
            found = store.find(trainer[0])
        assert found is not None
        said: list[str] = []
        base, compiler = found.labels[BASE_NAME], found.labels[COMPILER] == "yes"
        assert training_image(said.append, base=base, compiler=compiler) == trainer
        assert said == []

    def test_candidates_find_the_pinned_packages_and_nothing_of_ours(
        self, trainer: tuple[str, str]
    ) -> None:
        program = """
import importlib.util, os, numpy, safetensors, torch
print(torch.__version__.partition("+")[0], numpy.__version__, safetensors.__version__)
print(importlib.util.find_spec("darwin_exp"), os.getuid(), torch.__cached__ is not None)
print(os.path.exists(torch.__cached__))
"""
        code, printed = contained(
            trainer[1], program, user=CANDIDATE, read_only=True, cap_drop=["ALL"]
        )
        assert code == 0, printed
        versions, rest, compiled = printed.splitlines()
        wanted = pins((PROJECT / "constraints.txt").read_text())
        assert versions.split() == [pin.partition("==")[2] for pin in wanted]
        assert rest == "None 65532 True"
        assert compiled == "True", "every start would compile torch's modules anew"

    @pytest.mark.slow
    def test_torch_compile_works_in_it(self, trainer: tuple[str, str]) -> None:
        program = "import torch; print(torch.compile(lambda x: (x * 2 + 1).sum())(torch.ones(8)))"
        places = ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        code, printed = contained(
            trainer[1],
            program,
            seconds=300,
            user=CANDIDATE,
            read_only=True,
            environment=dict.fromkeys(places, "/scratch"),
            tmpfs={"/scratch": "exec,size=512m,uid=65532,mode=700"},
        )
        assert code == 0, printed
        assert printed.splitlines()[-1] == "tensor(24.)"

    def test_a_run_pins_it_by_its_id(self, trainer: tuple[str, str]) -> None:
        box, said = containers(), list[str]()
        assert containment.choose_sandbox(box, said.append, False, True) == trainer[0]
        assert box.image == trainer[1]
        assert containment.sandbox_spec(box).image == trainer[1]
        assert trainer[0] in said[-1]
