"""What only containers have. Ids in names are those of the catalogue of threats."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.image.store import open_store
from darwin_exp.individual import Genome, SandboxSpec
from darwin_exp.protocols import InfrastructureFailure, Launch, Limits, SandboxUnavailable, Zone
from darwin_exp.sandbox import container as container_module
from darwin_exp.sandbox import docker as docker_module
from darwin_exp.sandbox import profile, reaping, trial
from darwin_exp.sandbox.cgroup import Books
from darwin_exp.sandbox.container import Container
from darwin_exp.sandbox.docker import DockerSandbox
from darwin_exp.sandbox.engine import Belonging, Engine, State, connect
from darwin_exp.sandbox.engine_calls import EngineFailure
from darwin_exp.sandbox.processes import resident_bytes
from darwin_exp.sandbox.profile import OUT, Housing, container_config, volume_options
from darwin_exp.sandbox.stream import MAX_UNREAD_BYTES
from darwin_exp.sandbox.supervised import PACKAGE_ROOT

GENOMES = Path(__file__).parents[1] / "genomes"
PATIENCE = 20.0
LABELS = {"run": "r1", "individual": "g00-i01", "attempt": "g00-i01/0.1"}

# A model program as a hostile one might behave on its channel.
SERVER = """
import os, signal, time
def serve(job, folder, reader, writer):
    while job["manner"] == "flood":
        writer.write(bytes(1 << 20))
    while job["manner"] == "as it comes" and (chunk := reader.read1(1 << 16)):
        writer.write(chunk)
        writer.flush()
    if job["manner"] == "chatter":
        print("z" * 3_000_000)
        writer.write(b"answer")
        writer.flush()
        time.sleep(600)
    if job["manner"] == "stop":
        os.kill(os.getppid(), signal.SIGSTOP)
        print("stopped it, or so it thinks", flush=True)
        time.sleep(600)
"""


@pytest.fixture(scope="module")
def options(docker_image: str) -> SandboxSpec:
    return SandboxSpec("docker", image=docker_image)


@pytest.fixture(scope="module")
def engine(options: SandboxSpec) -> Iterator[Engine]:
    assert options.image
    with contextlib.closing(connect()) as engine:
        yield engine


@pytest.fixture(scope="module")
def sandbox(
    options: SandboxSpec, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DockerSandbox]:
    server = tmp_path_factory.mktemp("server") / "hostile_server.py"
    server.write_text(SERVER)
    sandbox = DockerSandbox(0, (0,), options, server=server, modules=())
    yield sandbox
    sandbox.close()


Start = Callable[..., Container]


@pytest.fixture
def start(sandbox: DockerSandbox) -> Iterator[Start]:
    started: list[Container] = []

    def start(train: str = "", zone: Zone = Zone.TRAIN, manner: str = "", **limits: Any) -> Any:
        genome = Genome.of({"train.py": textwrap.dedent(train), "model.py": ""})
        job = {"manner": manner}
        launch = Launch("test", zone, genome, {}, job, Limits(**limits), LABELS)
        started.append(sandbox.start(launch))
        return started[-1]

    yield start
    for container in started:
        container.close()


def printed(container: Container) -> Any:
    assert container.wait(PATIENCE)
    text, _ = container.log()
    assert text.strip(), "it printed nothing"
    return json.loads(text.strip().splitlines()[-1])


def left_of(engine: Engine, sandbox: DockerSandbox) -> list[str]:
    return [each.name for each in engine.labelled(f"{reaping.SANDBOX_LABEL}={sandbox._token}")]


def comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class TestProfile:
    def test_a14_it_has_no_right_and_can_gain_none(self, start: Start) -> None:
        train = """
        import ctypes, json, os
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        flags = [int(status[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd")]
        libc = ctypes.CDLL(None)
        spaces = [libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)]
        mounted = libc.mount(b"none", b"/scratch", b"tmpfs", 0, None)
        print(json.dumps([os.getresuid(), os.getresgid(), flags, status["NoNewPrivs"].strip(),
                          status["Seccomp"].strip(), spaces, mounted]))
        """
        ids = [profile.UID] * 3
        assert printed(start(train)) == [ids, ids, [0] * 4, "1", "2", [-1] * 3, -1]

    def test_its_limits_are_those_of_the_launch(self, start: Start) -> None:
        train = """
        import json, os, resource, socket
        names = ("RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_CORE")
        limits = [resource.getrlimit(getattr(resource, name)) for name in names]
        print(json.dumps([limits, sorted(os.sched_getaffinity(0)), socket.gethostname(),
                          os.getcwd(), sorted(os.listdir("."))]))
        """
        files = [[4096, 4096], [7 << 20, 7 << 20], [0, 0]]
        expected = ["code", "in", "job.json", "out", "tmp"]
        assert printed(start(train, file_mb=7)) == [files, [0], "candidate", "/job", expected]

    def test_a13_all_it_can_write_to_lies_in_memory(self, start: Start) -> None:
        train = """
        import json, os
        def works(folder):
            try: open(folder + "/probe", "w").close()
            except OSError: return False
            return True
        lines = [line.split() for line in open("/proc/mounts")]
        kinds = {line[1]: line[2] for line in lines}
        found = {}
        for folder, below, _ in os.walk("/"):
            if folder == "/":
                below[:] = set(below) - {"proc", "sys"}
            if works(folder):
                found[folder] = kinds.get(folder)
        print(json.dumps(found))
        """
        places = printed(start(train))
        assert set(places) >= {"/job/out", "/scratch", "/tmp", "/dev/shm"}
        assert set(places.values()) <= {"tmpfs", "mqueue"}

    def test_compiled_code_can_be_run_from_the_scratch_folder_alone(self, start: Start) -> None:
        train = """
        import json, os, shutil, subprocess, sys
        def runs(folder):
            shutil.copy(shutil.which("true"), folder + "/true")
            try: return subprocess.run([folder + "/true"]).returncode == 0
            except PermissionError: return False
        print(json.dumps([runs(os.environ["TMPDIR"]), runs("/tmp"), os.environ["HOME"]]))
        """
        assert printed(start(train)) == [True, False, "/scratch"]

    def test_a15_of_the_host_it_learns_neither_environment_nor_paths(
        self, start: Start, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DARWIN_TEST_API_KEY", "canary-5f1b")
        train = """
        import json, os, pathlib
        mounts = pathlib.Path("/proc/self/mountinfo").read_text()
        print(json.dumps([dict(os.environ), mounts, os.path.exists("/var/run/docker.sock")]))
        """
        environment, mounts, engine_socket = printed(start(train))
        assert "canary" not in json.dumps(environment)
        assert environment["OMP_NUM_THREADS"] == "1"
        assert environment["NVIDIA_VISIBLE_DEVICES"] == "void"
        assert str(PACKAGE_ROOT) not in mounts
        assert not engine_socket

    def test_it_is_known_to_the_engine_by_its_labels(self, start: Start, engine: Engine) -> None:
        container = start("import time\ntime.sleep(600)")
        found = [each for each in engine.labelled("darwin.run=r1") if each.name == container.name]
        assert len(found) == 2  # the container and its volume
        for each in found:
            assert each.labels["darwin.individual"] == "g00-i01"
            assert each.labels["darwin.attempt"] == "g00-i01/0.1"
            assert each.labels["darwin.owner"] == reaping.owner()
            assert float(each.labels["darwin.deadline"]) > time.time()


class TestWhatItLeaves:
    def test_a9_a11_many_files_together_fill_no_more_than_the_volume(self, start: Start) -> None:
        train = """
        import errno, json
        n, why = 0, None
        while why is None:
            try: open(f"out/{n}", "wb").write(bytes(1 << 20)); n += 1
            except OSError as error: why = error.errno
        print(json.dumps([n, errno.errorcode[why]]))
        """
        n, why = printed(start(train, file_mb=16))
        assert 8 <= n <= 16
        assert why == "ENOSPC"

    def test_a10_the_number_of_files_is_bounded(self, start: Start) -> None:
        train = """
        import errno, json
        n, why = 0, None
        while why is None and n < 200_000:
            try: open(f"out/{n}", "w").close(); n += 1
            except OSError as error: why = errno.errorcode[error.errno]
        print(json.dumps([n, why]))
        """
        n, why = printed(start(train))
        assert n < profile.MAX_INODES
        assert why == "ENOSPC"

    @pytest.mark.parametrize("place", ["out", "/dev/shm", "/scratch"])
    def test_a17_what_lies_in_memory_counts_as_memory(self, start: Start, place: str) -> None:
        train = f"""
        for n in range(8):
            open(f"{place}/{{n}}", "wb").write(bytes(30 << 20))
        """
        container = start(train, memory_mb=120)
        assert container.wait(PATIENCE)
        assert container.close().out_of_memory

    def test_a_large_file_arrives_whole_and_within_the_limit(
        self, start: Start, tmp_path: Path
    ) -> None:
        train = """
        import hashlib, os
        content = os.urandom(1 << 20) * 40
        open("out/large", "wb").write(content)
        os.link("out/large", "out/again")
        print('"' + hashlib.sha256(content).hexdigest() + '"')
        """
        container = start(train)
        digest = printed(container)
        size = 40 << 20
        refused = container.collect(["large", "again"], tmp_path, size)
        assert list(refused) == ["again"]  # C4: the second name of one file counts again
        told = subprocess.run(["sha256sum", tmp_path / "large"], capture_output=True, text=True)
        assert told.stdout.split()[0] == digest
        assert container.collect(["again"], tmp_path / "two", size) == {}
        assert (tmp_path / "two" / "again").stat().st_size == size

    def test_c9_what_is_not_there_is_told_as_the_system_tells_it(
        self, start: Start, tmp_path: Path
    ) -> None:
        container = start("pass")
        assert container.wait(PATIENCE)
        missing = container.collect(["model.json"], tmp_path, 100)
        assert missing == {"model.json": "No such file or directory"}


# What a candidate may put before what is wanted, in the order in which the engine goes through it.
MESSES = {
    "many files": "for n in range(2000): open(f'out/a{n}', 'w').close()",
    "a long file": "open('out/a', 'wb').truncate(10**12)",
    "a folder": "os.makedirs('out/a/b'); open('out/a/b/model.json', 'w').close()",
    "a deep folder": """
os.chdir("out")
for _ in range(500): os.mkdir("a" * 200); os.chdir("a" * 200)
""",
    "a link": "os.symlink('/etc/passwd', 'out/a')",
    "a pipe": "os.mkfifo('out/a')",
    "a second name": "os.link('out/progress.jsonl', 'out/a')",
}
WANTED = ("model.json", "progress.jsonl")
LEAVES_BOTH = "for name in ('model.json', 'progress.jsonl'): open('out/' + name, 'w').write(name)\n"


class TestTakingAllAtOnce:
    def test_what_an_honest_candidate_leaves_takes_one_request(
        self, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        container = start(LEAVES_BOTH + "open('out/notes', 'w').write('not asked for')")
        assert container.wait(PATIENCE)

        def never(*_: Any) -> int:
            raise AssertionError("a file was asked for by itself")

        monkeypatch.setattr(Engine, "copy_file", never)
        assert container.collect(WANTED, tmp_path / "taken", 100) == {}
        left = {path.name: path.read_text() for path in (tmp_path / "taken").iterdir()}
        assert left == {name: name for name in WANTED}

    @pytest.mark.parametrize("mess", MESSES)
    def test_c3_c6_what_lies_beside_costs_no_more_than_a_request(
        self, start: Start, engine: Engine, tmp_path: Path, mess: str
    ) -> None:
        container = start(f"import os\n{LEAVES_BOTH}{MESSES[mess]}", file_mb=2_000_000)
        assert container.wait(PATIENCE)
        assert container.log()[0] == ""
        container.freeze()
        # All at once none are taken, though one by one they can be.
        (tmp_path / "none").mkdir()
        began = time.monotonic()
        place, wanted = tmp_path / "none", frozenset(WANTED)
        assert engine.copy_folder(container.name, OUT, wanted, place, 100) == {}
        assert list(place.iterdir()) == []
        assert container.collect(WANTED, tmp_path / "taken", 100) == {}
        assert time.monotonic() - began < PATIENCE / 2
        assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == sorted(WANTED)

    @pytest.mark.parametrize(
        "make",
        [
            "os.symlink('progress.jsonl', 'out/model.json')",
            "os.mkfifo('out/model.json')",
            "socket.socket(socket.AF_UNIX).bind('out/model.json')",
            "os.mkdir('out/model.json')",
        ],
        ids=["link", "pipe", "socket", "folder"],
    )
    def test_c1_c2_what_is_wanted_and_no_plain_file_is_told_as_such(
        self, start: Start, tmp_path: Path, make: str
    ) -> None:
        container = start(f"import os, socket\n{make}\nopen('out/progress.jsonl', 'w').close()")
        assert container.wait(PATIENCE)
        refused = container.collect(WANTED, tmp_path / "taken", 100)
        assert refused == {"model.json": "is not a plain file"}
        assert [path.name for path in (tmp_path / "taken").iterdir()] == ["progress.jsonl"]


class TestOutput:
    def test_a12_a_flood_without_end_is_bounded_and_delays_nothing(self, start: Start) -> None:
        container = start("while True: print('y' * 1_000_000)", log_bytes=10_000)
        before = resident_bytes(os.getpid())
        began = time.monotonic()
        assert not container.wait(2.0)
        container.freeze()
        text, truncated = container.log()
        assert container.close().code is None
        assert time.monotonic() - began < 2.0 + 10.0
        assert (len(text), truncated) == (10_000, True)
        assert resident_bytes(os.getpid()) - before < 100 << 20

    def test_answers_that_nobody_reads_are_bounded_and_can_still_be_read(
        self, start: Start
    ) -> None:
        container = start(zone=Zone.MODEL, manner="flood")
        assert not container.wait(1.5)
        assert container._stream.n_unread < MAX_UNREAD_BYTES + (1 << 20)
        wanted = MAX_UNREAD_BYTES + (8 << 20)
        assert container.receive(wanted, time.monotonic() + PATIENCE) == bytes(wanted)

    def test_a_request_longer_than_any_pipe_may_be_answered_while_it_is_sent(
        self, start: Start
    ) -> None:
        container = start(zone=Zone.MODEL, manner="as it comes")
        request = os.urandom(12 << 20)
        container.send(request, time.monotonic() + PATIENCE)
        assert container.receive(len(request), time.monotonic() + PATIENCE) == request

    def test_what_a_model_prints_keeps_no_answer_back(self, start: Start) -> None:
        container = start(zone=Zone.MODEL, manner="chatter")
        assert container.receive(6, time.monotonic() + PATIENCE) == b"answer"
        assert container.log()[0].strip("z\n") == ""


class TestWhoEndedIt:
    @pytest.mark.parametrize("zone", list(Zone))
    def test_e6_killed_from_outside_is_not_the_candidates_doing(
        self, start: Start, engine: Engine, zone: Zone
    ) -> None:
        container = start("import time\ntime.sleep(600)", zone, manner="as it comes")
        engine.kill(container.name)
        assert container.wait(PATIENCE)
        ended = container.close()
        assert (ended.code, ended.out_of_memory) == (None, False)

    def test_e6_removed_from_outside_is_not_the_candidates_doing(
        self, start: Start, engine: Engine, tmp_path: Path
    ) -> None:
        container = start("import time\ntime.sleep(600)")
        engine.purge(container.name, PATIENCE)
        assert container.wait(PATIENCE)
        with pytest.raises(InfrastructureFailure, match="vanished"):
            container.collect(["model.json"], tmp_path, 100)
        assert container.close().code is None

    def test_a8_a_candidate_can_neither_end_nor_stop_nor_open_its_keeper(
        self, start: Start, tmp_path: Path
    ) -> None:
        train = """
        import contextlib, ctypes, json, os, signal, time
        def opens(path):
            try: os.close(os.open(path, os.O_RDWR))
            except PermissionError: return False
            return True
        victim = os.fork()  # the control: whom it can do all that to
        if victim == 0:
            while True: time.sleep(1)
        held = [[opens(f"/proc/{pid}/mem"), os.access(f"/proc/{pid}/fd", os.R_OK)]
                for pid in (victim, os.getppid())]
        traced = ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)
        for pid in (os.getppid(), victim):
            for number in range(1, 65):
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        killed = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
        with contextlib.suppress(ProcessLookupError):  # there is nobody else
            os.kill(-1, signal.SIGKILL)
        open("out/model.json", "w").write("kept by the keeper alone")
        print(json.dumps([os.getppid(), held, traced, killed < 0]))
        """
        container = start(train)
        assert printed(container) == [1, [[True, True], [False, False]], -1, True]
        assert container.collect(["model.json"], tmp_path, 100) == {}
        assert container.close().code == 0

    @pytest.mark.parametrize(("oom", "expected"), [(0, (None, False)), (1, (-9, True))])
    def test_a4_where_the_kernel_tells_whose_memory_it_was_the_engine_is_not_believed(
        self,
        start: Start,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        oom: int,
        expected: tuple[int | None, bool],
    ) -> None:
        container = start("import os\nos.kill(os.getpid(), 9)")
        assert container.wait(PATIENCE)
        (tmp_path / "memory.events").write_text(f"low 0\nhigh 0\nmax 0\noom {oom}\noom_kill 1\n")
        container._books = Books(tmp_path, tmp_path)
        honest = Engine.state

        def newer(engine: Engine, *arguments: Any) -> State | None:
            state = honest(engine, *arguments)
            return state and replace(state, oom_killed=True)

        monkeypatch.setattr(Engine, "state", newer)
        ended = container.close()
        assert (ended.code, ended.out_of_memory) == expected

    def test_a4_a_child_killed_for_memory_is_noted_where_the_kernels_books_cannot_be_seen(
        self, start: Start
    ) -> None:
        train = """
        import os, time
        if os.fork() == 0:
            hoard = []
            while True: hoard.append(b"x" * 20_000_000)
        os.wait()
        time.sleep(0.5)  # the engine hears of it a little later
        """
        container = start(train, memory_mb=120)
        container._books = None
        assert container.wait(PATIENCE)
        ended = container.close()
        assert (ended.code, ended.out_of_memory) == (0, True)

    def test_a_container_that_cannot_be_frozen_is_killed_and_our_own_fault(
        self, start: Start, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        container = start("while True: pass")

        def refuse(*_: Any) -> None:
            raise EngineFailure("unable to freeze", 500)

        monkeypatch.setattr(Engine, "pause", refuse)
        with pytest.raises(InfrastructureFailure, match="unable to freeze"):
            container.freeze()
        state = engine.state(container.name)
        assert state is None or not state.running
        assert container.close().code is None

    def test_e3_a_frozen_or_ended_container_may_be_frozen_again(
        self, start: Start, engine: Engine
    ) -> None:
        frozen, ended = start("while True: pass"), start(zone=Zone.MODEL)
        engine.pause(frozen.name)
        frozen.freeze()
        assert ended.wait(PATIENCE)
        ended.freeze()
        assert frozen.close().code is None
        assert ended.close().code == 0


class TestNothingIsLeft:
    def test_closing_verifies_and_does_so_once(self, start: Start, engine: Engine) -> None:
        container = start("import time\ntime.sleep(600)")
        folder = container._work.path
        assert folder.is_dir()
        began = time.monotonic()
        ended = container.close()
        assert not is_running(engine, container.name)
        assert not folder.exists()
        assert comes_true(lambda: container.name not in names_of(engine))
        assert time.monotonic() - began < 10.0
        assert container.close() is ended

    def test_records_are_removed_beside_the_next_start_which_waits_for_it(
        self, start: Start, engine: Engine, slow_removal: threading.Event
    ) -> None:
        container = start("import time\ntime.sleep(600)")
        container.close()
        assert container.name in names_of(engine)  # the control: it takes its time
        assert not is_running(engine, container.name)
        threading.Timer(1.0, slow_removal.set).start()
        start("import time\ntime.sleep(600)")
        assert slow_removal.is_set()
        assert container.name not in names_of(engine)

    def test_closing_the_sandbox_waits_until_the_last_records_are_gone(
        self, options: SandboxSpec, engine: Engine, slow_removal: threading.Event
    ) -> None:
        sandbox = DockerSandbox(0, (0,), options, modules=())
        genome = Genome.of({"train.py": "", "model.py": ""})
        sandbox.start(Launch("last", Zone.TRAIN, genome, {}, {}, Limits())).close()
        assert left_of(engine, sandbox)
        threading.Timer(0.5, slow_removal.set).start()
        sandbox.close()
        assert left_of(engine, sandbox) == []

    def test_e3_records_that_cannot_be_removed_are_our_own_fault_when_the_next_is_started(
        self, options: SandboxSpec, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sandbox = DockerSandbox(0, (0,), options, modules=())
        genome = Genome.of({"train.py": "while True: pass", "model.py": ""})
        launch = Launch("stuck", Zone.TRAIN, genome, {}, {}, Limits())
        try:
            with monkeypatch.context() as patch:

                def refuse(_: Engine, name: str, *__: Any) -> None:
                    raise EngineFailure(f"{name} is still there")

                patch.setattr(Engine, "purge", refuse)
                first = sandbox.start(launch)
                first.close()
                assert not is_running(engine, first.name)
                with pytest.raises(InfrastructureFailure, match=f"{first.name} is still there"):
                    sandbox.start(launch)
                assert not any(is_running(engine, name) for name in left_of(engine, sandbox))
        finally:
            sandbox.close()
        assert left_of(engine, sandbox) == []

    @pytest.mark.parametrize("step", ["create", "attach", "start"])
    def test_a20_a_start_that_fails_half_way_leaves_nothing(
        self, sandbox: DockerSandbox, engine: Engine, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        sandbox._removals.finish()  # of what other tests left
        before = left_of(engine, sandbox)

        def refuse(*_: Any) -> None:
            raise EngineFailure("the engine said no", 500)

        genome = Genome.of({"train.py": "", "model.py": ""})
        with monkeypatch.context() as patch:
            patch.setattr(Engine, step, refuse)
            with pytest.raises(InfrastructureFailure, match="said no"):
                sandbox.start(Launch("half", Zone.TRAIN, genome, {}, {}, Limits()))
        assert left_of(engine, sandbox) == before

    def test_e3_a_name_that_is_taken_costs_one_launch_and_no_more(
        self, options: SandboxSpec, engine: Engine
    ) -> None:
        sandbox = DockerSandbox(0, (0,), options, modules=())
        try:
            taken = f"candidate-{sandbox._token}-1"
            with make_orphan(engine, options, taken, {}):
                genome = Genome.of({"train.py": "", "model.py": ""})
                launch = Launch("taken", Zone.TRAIN, genome, {}, {}, Limits())
                with pytest.raises(InfrastructureFailure, match=r"(?i)conflict|in use"):
                    sandbox.start(launch)
                sandbox.start(launch)  # under its next name
        finally:
            sandbox.close()

    @pytest.mark.parametrize("zone", list(Zone))
    def test_d4_a_harness_killed_outright_leaves_nothing_that_runs_and_the_next_one_clears_up(
        self, options: SandboxSpec, engine: Engine, zone: Zone
    ) -> None:
        harness = subprocess.Popen(
            [sys.executable, GENOMES / "lone_harness.py", "docker", options.image, zone.value],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
            text=True,
        )
        assert harness.stdout is not None
        name, folder = harness.stdout.readline().split()
        # The control: while its owner lives, nobody touches it.
        DockerSandbox(0, (0,), options, modules=()).close()
        assert is_running(engine, name)
        assert Path(folder).is_dir()
        harness.kill()
        harness.wait()
        harness.stdout.close()
        assert comes_true(lambda: not is_running(engine, name))
        DockerSandbox(0, (0,), options, modules=()).close()
        assert name not in [each.name for each in engine.labelled(reaping.OWNER_LABEL)]
        assert not Path(folder).exists()

    @pytest.mark.parametrize("zone", list(Zone))
    def test_d4_nor_does_a_candidate_that_would_stop_its_keeper_outlive_the_harness(
        self, start: Start, engine: Engine, zone: Zone
    ) -> None:
        train = """
        import os, signal, time
        os.kill(os.getppid(), signal.SIGSTOP)
        print("stopped it, or so it thinks", flush=True)
        time.sleep(600)
        """
        container = start(train, zone, manner="stop")
        assert not container.wait(1.0)
        assert "stopped it" in container.log()[0]
        container._stream.close()  # as the kernel does where the harness was killed
        assert comes_true(lambda: not is_running(engine, container.name))

    def test_d3_what_is_run_to_try_an_image_is_known_by_its_labels(
        self, options: SandboxSpec, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ours = f"{reaping.OWNER_LABEL}={reaping.owner()}"
        before = {each.name for each in engine.labelled(ours)}
        seen: list[Belonging] = []
        with open_store() as store:
            honest = store._api.start

            def look(made: str) -> None:
                seen.extend(each for each in engine.labelled(ours) if each.name not in before)
                honest(made)

            monkeypatch.setattr(store._api, "start", look)
            assert store.run(options.image, "print(6 * 7)") == "42"
        (found,) = seen
        assert reaping.is_orphan(found.labels, time.time())  # now that nobody runs it any more
        assert engine.state(found.name) is None

    def test_d3_only_what_the_dead_left_is_reaped(
        self, options: SandboxSpec, engine: Engine
    ) -> None:
        boot, namespace, _, started = reaping.owner().split(":")
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        dead = {reaping.OWNER_LABEL: f"{boot}:{namespace}:{child.pid}:{started}"}
        parent = f"{boot}:{namespace}:{os.getppid()}:{reaping._started(os.getppid())}"
        unique = f"reaping-{os.getpid()}"
        with (
            make_orphan(engine, options, f"{unique}-dead", dead),
            make_orphan(engine, options, f"{unique}-living", {reaping.OWNER_LABEL: parent}),
            make_orphan(engine, options, f"{unique}-strange", {}),
        ):
            reaping.reap(engine)  # or who runs beside us was faster
            for fate, there in (("dead", False), ("living", True), ("strange", True)):
                assert (engine.state(f"{unique}-{fate}") is not None) == there
            names = [each.name for each in engine.labelled(reaping.OWNER_LABEL)]
            assert f"{unique}-dead" not in names  # its volume neither


@pytest.fixture
def slow_removal(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let nothing be removed before this is set."""
    removed, honest = threading.Event(), Engine.purge

    def purge(engine: Engine, name: str, seconds: float) -> None:
        removed.wait(PATIENCE)
        honest(engine, name, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "purge", purge)
        yield removed
        removed.set()


def names_of(engine: Engine) -> set[str]:
    return {each.name for each in engine.labelled(reaping.OWNER_LABEL)}


def is_running(engine: Engine, name: str) -> bool:
    state = engine.state(name)
    return state is not None and state.running


@contextlib.contextmanager
def make_orphan(
    engine: Engine, options: SandboxSpec, name: str, labels: Mapping[str, str]
) -> Iterator[None]:
    """Make a container and a volume that belong to whom the labels name."""
    housing = Housing(options.image, None, None, (0,), Path("/usr"), dict(labels))
    try:
        engine.create_volume(name, volume_options(Limits()), labels)
        engine.create(name, container_config(housing, ["-c", ""], Limits(), volume=name))
        yield
    finally:
        engine.purge(name, PATIENCE)


class TestAvailability:
    def refused(self, options: SandboxSpec, engine: Engine) -> str:
        """Return why a sandbox is refused, having seen that the refusal leaves nothing."""
        ours = f"{reaping.OWNER_LABEL}={reaping.owner()}"  # other tests run beside this one
        before = {each.name for each in engine.labelled(ours)}
        with pytest.raises(SandboxUnavailable) as refusal:
            DockerSandbox.check(options)
        with pytest.raises(SandboxUnavailable):
            DockerSandbox(0, (0,), options)
        assert {each.name for each in engine.labelled(ours)} <= before
        return str(refusal.value)

    def test_what_is_there_passes(self, options: SandboxSpec) -> None:
        DockerSandbox.check(options)

    @pytest.mark.parametrize("image", ["", f"sha256:{'0' * 64}", "no-such-image:0"])
    def test_a19_a_missing_image_is_not_fetched(
        self, options: SandboxSpec, engine: Engine, image: str
    ) -> None:
        assert "make image" in self.refused(replace(options, image=image), engine)

    def test_a18_an_unknown_runtime_is_refused_and_not_replaced(
        self, options: SandboxSpec, engine: Engine
    ) -> None:
        said = self.refused(replace(options, runtime="no-such-runtime"), engine)
        assert "'no-such-runtime', only" in said
        assert "runc" in said

    @pytest.mark.skipif(
        shutil.which("nvidia-smi") is not None, reason="here, there may be a GPU to be had"
    )
    def test_a16_a_gpu_that_is_not_there_is_refused(
        self, options: SandboxSpec, engine: Engine
    ) -> None:
        said = self.refused(replace(options, gpus=("0",)), engine)
        assert "nvidia-container-toolkit" in said

    def test_a16_a_slot_without_a_gpu_of_its_own_is_refused(self, options: SandboxSpec) -> None:
        with pytest.raises(SandboxUnavailable, match="workers=1"):
            DockerSandbox(1, (0,), replace(options, gpus=("0",)))

    def test_a16_without_a_gpu_none_is_trained_on(self, sandbox: DockerSandbox) -> None:
        genome = Genome.of({"train.py": "", "model.py": ""})
        launch = Launch("cuda", Zone.TRAIN, genome, {}, {}, Limits(device="cuda"))
        with pytest.raises(InfrastructureFailure, match=r"sandbox\.gpus"):
            sandbox.start(launch)

    def test_an_engine_that_does_not_see_our_files_is_refused(
        self, options: SandboxSpec, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def elsewhere(housing: Housing, *arguments: Any, **more: Any) -> dict[str, Any]:
            unseen = replace(housing, programs=housing.programs / "unseen")
            return container_config(unseen, *arguments, **more)

        monkeypatch.setattr(trial, "container_config", elsewhere)
        assert "does not see our files" in self.refused(options, engine)

    def test_an_image_with_volumes_of_its_own_is_refused(
        self, options: SandboxSpec, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config: dict[str, Any] = {"Config": {"Volumes": {"/data": {}}}}
        monkeypatch.setattr(Engine, "image", lambda *_: config)
        assert "/data" in self.refused(options, engine)

    def test_an_engine_whose_volumes_candidates_cannot_write_to_is_refused(
        self, options: SandboxSpec, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def shut(limits: Limits) -> dict[str, str]:
            return {**volume_options(limits), "o": "uid=0,mode=0700"}

        monkeypatch.setattr(trial, "volume_options", shut)
        assert "not write to its volume" in self.refused(options, engine)

    def test_a1_an_engine_whose_containers_are_in_our_network_is_refused(
        self, options: SandboxSpec, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def shared(*arguments: Any, **more: Any) -> dict[str, Any]:
            config = container_config(*arguments, **more)
            config["HostConfig"]["NetworkMode"] = "host"
            return config | {"NetworkDisabled": False}

        monkeypatch.setattr(trial, "container_config", shared)
        assert "in the network of this machine" in self.refused(options, engine)

    def test_what_a_trial_leaves_that_was_killed_is_found_by_its_owner(
        self, options: SandboxSpec, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notes: list[str] = []

        def look(housing: Housing, *arguments: Any, **more: Any) -> dict[str, Any]:
            notes.append((housing.programs.parent / reaping.OWNER_FILE).read_text())
            return container_config(housing, *arguments, **more)

        monkeypatch.setattr(trial, "container_config", look)
        DockerSandbox.check(options)
        assert notes == [reaping.owner()]

    def test_an_engine_that_filters_no_system_calls_is_refused(
        self, options: SandboxSpec, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        info = {**engine.info(), "SecurityOptions": ["name=seccomp,profile=unconfined"]}
        monkeypatch.setattr(Engine, "info", lambda _: info)
        assert "does not filter system calls" in self.refused(options, engine)

    def test_an_engine_that_cannot_limit_swap_is_refused_where_there_is_some(
        self,
        options: SandboxSpec,
        engine: Engine,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        info = {**engine.info(), "SwapLimit": False}
        monkeypatch.setattr(Engine, "info", lambda _: info)
        monkeypatch.setattr(trial, "_SWAPS", tmp_path / "swaps")
        (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n")
        DockerSandbox.check(options)
        with (tmp_path / "swaps").open("a") as swaps:
            swaps.write("/dev/sdb1 partition 4194300 0 -2\n")
        assert "swapoff -a" in self.refused(options, engine)

    @pytest.mark.parametrize("key", ["MemoryLimit", "PidsLimit", "CPUSet"])
    def test_an_engine_that_cannot_limit_is_refused(
        self, options: SandboxSpec, engine: Engine, monkeypatch: pytest.MonkeyPatch, key: str
    ) -> None:
        info = {**engine.info(), key: False}
        monkeypatch.setattr(Engine, "info", lambda _: info)
        assert "cannot limit" in self.refused(options, engine)


class Relay:
    """A way to the engine that can be cut."""

    def __init__(self, place: Path, target: str) -> None:
        self._target = target
        self._ends: list[socket.socket] = []
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(place))
        self._door.listen()
        self._threads = [threading.Thread(target=self._admit)]
        self._threads[0].start()

    def _admit(self) -> None:
        while True:
            try:
                visitor, _ = self._door.accept()
            except OSError:
                return
            host = socket.socket(socket.AF_UNIX)
            host.connect(self._target)
            self._ends += [visitor, host]
            for source, sink in ((visitor, host), (host, visitor)):
                self._threads.append(threading.Thread(target=self._carry, args=(source, sink)))
                self._threads[-1].start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for end in (self._door, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        for end in (self._door, *self._ends):
            end.close()


@pytest.fixture
def collected() -> Iterator[None]:
    """Collect what a test left behind while its own filter of warnings is in place."""
    yield
    gc.collect()


class TestALostEngine:
    @pytest.mark.parametrize("zone", list(Zone))
    # docker-py leaves a socket to be collected where a connection is refused.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.usefixtures("collected")
    def test_e2_a_connection_lost_is_our_own_fault_and_what_ran_is_cleared_up_later(
        self,
        options: SandboxSpec,
        engine: Engine,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        zone: Zone,
    ) -> None:
        place = tmp_path / "engine.sock"
        usual = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        relay = Relay(place, usual.removeprefix("unix://"))
        monkeypatch.setattr(container_module, "REMOVE_SECONDS", 0.5)
        monkeypatch.setattr(docker_module, "REMOVE_SECONDS", 0.5)
        with monkeypatch.context() as patch:
            patch.setenv("DOCKER_HOST", f"unix://{place}")
            server = GENOMES / "echo_server.py"
            sandbox = DockerSandbox(0, (0,), options, server=server, modules=())
        genome = Genome.of({"train.py": "while True: pass", "model.py": ""})
        launch = Launch("lost", zone, genome, {}, {"manner": "silent"}, Limits())
        container = sandbox.start(launch)
        relay.cut()
        assert container.wait(PATIENCE)
        if zone is Zone.MODEL:
            with pytest.raises(EOFError):
                container.receive(1, time.monotonic() + PATIENCE)
            with pytest.raises(EOFError):
                container.send(b"x", time.monotonic() + PATIENCE)
        with pytest.raises(InfrastructureFailure):
            container.freeze()
        with pytest.raises(InfrastructureFailure):
            container.close()
        assert container.close().code is None
        # Nobody is at the other end of its standard input any more.
        assert comes_true(lambda: not is_running(engine, container.name))
        sandbox.close()
        assert container.name in left_of(engine, sandbox)
        DockerSandbox(0, (0,), options, modules=()).close()
        assert left_of(engine, sandbox) == []

    def test_e3_a_question_is_asked_again_where_the_engine_stumbles(
        self, start: Start, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        container = start("import time\ntime.sleep(600)")
        honest: Callable[..., Any] = engine._client.request
        answers = iter([ConnectionResetError("the engine hung up"), None])

        def stumbling(*arguments: Any, **more: Any) -> Any:
            if (error := next(answers)) is not None:
                raise error
            return honest(*arguments, **more)

        monkeypatch.setattr(engine._client, "request", stumbling)
        assert is_running(engine, container.name)
