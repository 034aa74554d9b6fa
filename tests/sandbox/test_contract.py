"""One contract, every sandbox. Ids in names are those of the catalogue of threats."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.individual import Genome, SandboxSpec
from darwin_exp.protocols import (
    InfrastructureFailure,
    Launch,
    Limits,
    Sandboxed,
    SandboxUnavailable,
    Zone,
)
from darwin_exp.sandbox import bubblewrap
from darwin_exp.sandbox import group as group_module
from darwin_exp.sandbox.bubblewrap import BubblewrapSandbox
from darwin_exp.sandbox.confinement import (
    become,
    become_signaller,
    has_processes,
    interpreter_folders,
    signal_user,
)
from darwin_exp.sandbox.docker import DockerSandbox
from darwin_exp.sandbox.engine import connect
from darwin_exp.sandbox.process import ProcessSandbox
from darwin_exp.sandbox.processes import Process, descendants
from darwin_exp.sandbox.reaping import SANDBOX_LABEL
from darwin_exp.sandbox.supervised import PACKAGE_ROOT, SupervisedSandbox
from tests.sandbox_image import base_or_skip

GENOMES = Path(__file__).parents[1] / "genomes"
SUPERVISED: dict[str, type[ProcessSandbox] | type[BubblewrapSandbox]] = {
    "process": ProcessSandbox,
    "bubblewrap": BubblewrapSandbox,
}
KINDS = (*SUPERVISED, "docker")
UID = 64_000
CANARY = "canary-5f1b"
# Outside /tmp, of which every candidate has its own, and where a checkout may lie.
A_PUBLIC_PLACE = next(place for place in ("/opt", "/srv", "/usr/local") if Path(place).is_dir())
PATIENCE = 20.0  # for what should take a moment, on a machine that is busy with other things

# Of the supervisor itself, or of what containers do otherwise for a good reason.
only_supervised = pytest.mark.parametrize("kind", SUPERVISED, indirect=True, scope="module")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only as root are users changed")


AnySandbox = SupervisedSandbox | DockerSandbox


def build(kind: str, **options: Any) -> Any:
    options = {"modules": ()} | options
    try:
        if kind == "docker":
            options.pop("hidden", None)  # a container shows nothing that could be hidden
            return DockerSandbox(0, (0,), SandboxSpec(kind, image=base_or_skip()), **options)
        return SUPERVISED[kind](0, (0,), UID, **options)
    except SandboxUnavailable as obstacle:
        if kind == "docker":  # an engine that answers, and cannot hold what it shall, is a failure
            raise
        pytest.skip(str(obstacle))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sandbox(kind: str) -> Iterator[AnySandbox]:
    os.environ["DARWIN_TEST_API_KEY"] = CANARY
    sandbox = build(kind, server=GENOMES / "echo_server.py")
    yield sandbox
    sandbox.close()
    del os.environ["DARWIN_TEST_API_KEY"]


Start = Callable[..., Sandboxed]


@pytest.fixture
def start(sandbox: AnySandbox) -> Iterator[Start]:
    """Start the given training code; whatever is still alive in the end is closed."""
    groups: list[Sandboxed] = []

    def start(
        train: str = "",
        zone: Zone = Zone.TRAIN,
        inputs: Mapping[str, Path] | None = None,
        job: Mapping[str, Any] | None = None,
        **limits: Any,
    ) -> Sandboxed:
        genome = Genome.of({"train.py": textwrap.dedent(train), "model.py": "", "extra.py": "x=7"})
        launch = Launch("test", zone, genome, inputs or {}, job or {}, Limits(**limits))
        groups.append(sandbox.start(launch))
        return groups[-1]

    yield start
    for group in groups:
        group.close()


def taken(group: Sandboxed, folder: Path, *names: str) -> dict[str, bytes]:
    refused = group.collect(names, folder, 10_000_000)
    assert refused == {}
    return {name: (folder / name).read_bytes() for name in names}


def printed(group: Sandboxed) -> Any:
    """Wait for the end and read the last line that was printed as JSON."""
    assert group.wait(PATIENCE)
    text, _ = group.log()
    assert text.strip(), "it printed nothing"
    return json.loads(text.strip().splitlines()[-1])


def alive(root: int) -> list[Process]:
    return [process for process in descendants(root) if process.state not in "ZX"]


def still_there(sandbox: AnySandbox) -> list[Any]:
    """Return the processes of a sandbox's groups, or its containers and volumes."""
    if isinstance(sandbox, DockerSandbox):
        return _in_engine(sandbox._token)
    return alive(sandbox._fork_server.pid)


def _in_engine(token: str) -> list[Any]:
    with contextlib.closing(connect()) as engine:
        return engine.labelled(f"{SANDBOX_LABEL}={token}")


def all_gone(sandbox: AnySandbox, seconds: float = PATIENCE) -> bool:
    deadline = time.monotonic() + seconds
    while still_there(sandbox):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def roll_call(sandbox: AnySandbox) -> Callable[[], list[Any]]:
    """Return what lists those who are there now and still are, without the sandbox to ask."""
    if isinstance(sandbox, DockerSandbox):
        token = sandbox._token
        return lambda: _in_engine(token)
    pids = [sandbox._fork_server.pid, *(p.pid for p in alive(sandbox._fork_server.pid))]
    return lambda: [pid for pid in pids if Process.read(pid)]


class TestStarting:
    def test_it_is_ready_before_genome_code_runs(self, start: Start) -> None:
        group = start("import time\nprint(time.monotonic())\ntime.sleep(1)")
        started_at = printed(group)
        assert started_at > group.ready_at - 0.5
        assert 0 < group.startup_seconds < PATIENCE

    def test_a_genome_finds_its_job_its_files_and_its_inputs(
        self, start: Start, tmp_path: Path
    ) -> None:
        (tmp_path / "tokens").write_bytes(b"\1\2")
        train = """
        import json, pathlib, sys
        import extra
        job = json.loads(pathlib.Path(sys.argv[1]).read_text())
        data = pathlib.Path(job["train"]).read_bytes()
        print(json.dumps([sys.argv[0], job["seed"], list(data), extra.x, __name__]))
        """
        job = {"train": "in/train.bin", "seed": 5}
        group = start(train, inputs={"train.bin": tmp_path / "tokens"}, job=job)
        assert printed(group) == ["train.py", 5, [1, 2], 7, "__main__"]

    def test_an_input_that_changed_is_given_anew(self, start: Start, tmp_path: Path) -> None:
        train = "print(open('in/text').read())"
        source = tmp_path / "text"
        for value in ("1", "22"):
            source.write_text(value)
            assert printed(start(train, inputs={"text": source})) == int(value)

    def test_a_missing_input_is_our_own_fault(self, start: Start, tmp_path: Path) -> None:
        with pytest.raises(InfrastructureFailure, match="nowhere"):
            start(inputs={"text": tmp_path / "nowhere"})

    def test_a_launcher_that_is_not_ready_in_time_is_our_own_fault(
        self, start: Start, sandbox: AnySandbox
    ) -> None:
        with pytest.raises(InfrastructureFailure, match="ready"):
            start("import time\ntime.sleep(600)", startup_seconds=0.0)
        assert all_gone(sandbox)

    def test_two_groups_of_a_sandbox_live_and_die_apart(self, start: Start) -> None:
        first, second = start("import time\ntime.sleep(600)"), start("input()")
        assert second.wait(PATIENCE)
        second.close()
        assert not first.wait(0.2)

    @only_supervised  # the small image has no torch
    def test_torch_is_imported_with_its_threads_and_lazy_imports_still_work(
        self, kind: str, tmp_path: Path
    ) -> None:
        pytest.importorskip("torch")
        sandbox = build(kind, modules=("torch", "numpy", "safetensors.torch"))
        train = """
        import sys
        warm = "torch" in sys.modules
        import json, sqlite3, xml.dom.minidom, torch, torch.nn.utils.parametrize
        from safetensors.torch import save_file
        save_file({"weight": torch.ones(2, 2) @ torch.ones(2, 2)}, "out/model.safetensors")
        print(json.dumps([warm, torch.get_num_threads()]))
        """
        genome = Genome.of({"train.py": textwrap.dedent(train), "model.py": ""})
        try:
            group = sandbox.start(Launch("torch", Zone.TRAIN, genome, {}, {}, Limits(threads=2)))
            assert printed(group) == [True, 2]
            assert len(taken(group, tmp_path, "model.safetensors")["model.safetensors"]) > 16
            assert group.close().code == 0
        finally:
            sandbox.close()


class TestEnding:
    @pytest.mark.parametrize(
        ("train", "code"),
        [
            ("pass", 0),
            ("raise SystemExit(3)", 3),
            ("raise SystemExit('a sentence')", 1),
            ("raise ValueError", 1),
            ("import nowhere", 1),
            ("def", 1),
            ("import os; os._exit(4)", 4),
            ("import os; os.kill(os.getpid(), 9)", -9),
            ("import os; os.killpg(0, 9)", -9),
            ("import ctypes; ctypes.string_at(0)", -11),
        ],
    )
    def test_an_exit_status_is_told(self, start: Start, train: str, code: int) -> None:
        group = start(train)
        assert group.wait(PATIENCE)
        ended = group.close()
        assert (ended.code, ended.out_of_memory) == (code, False)
        assert group.close() == ended

    def test_a_traceback_starts_where_the_genome_does(self, start: Start) -> None:
        group = start("import sys\nprint('first')\nraise ValueError('what went wrong')")
        assert group.wait(PATIENCE)
        text, truncated = group.log()
        assert text.startswith("first\n")
        assert 'code/train.py", line 3' in text
        assert text.endswith("ValueError: what went wrong\n")
        assert "launcher.py" not in text
        assert not truncated
        group.close()
        assert group.log() == (text, False)

    def test_what_is_registered_for_the_end_still_runs(self, start: Start) -> None:
        train = """
        import atexit, threading, time, weakref
        class Thing: pass
        thing = Thing()
        weakref.finalize(thing, print, "finalised")
        atexit.register(print, "at exit")
        threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
        """
        group = start(train)
        assert group.wait(PATIENCE)
        assert sorted(group.log()[0].split("\n")) == ["", "at exit", "finalised", "thread"]

    def test_a5_an_endless_loop_is_told_from_an_end(self, start: Start) -> None:
        group = start("while True: pass")
        before = time.monotonic()
        assert not group.wait(0.5)
        assert time.monotonic() - before >= 0.5
        ended = group.close()
        assert ended.code is None
        assert ended.cpu_seconds > 0

    def test_a6_what_ignores_sigterm_is_killed(self, start: Start, sandbox: AnySandbox) -> None:
        train = """
        import signal, time
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: time.sleep(1)
        """
        group = start(train)
        assert not group.wait(0.3)
        assert group.close().code is None
        assert all_gone(sandbox)

    def test_a7_a_daemon_does_not_outlive_its_group(
        self, start: Start, sandbox: AnySandbox
    ) -> None:
        train = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        os.wait()
        """
        group = start(train)
        assert group.wait(PATIENCE)
        assert group.close().code == 0
        assert all_gone(sandbox)

    def test_a2_a_fork_bomb_is_bounded(self, start: Start, sandbox: AnySandbox) -> None:
        train = """
        import os, time
        n = 0
        try:
            while n < 200:
                if os.fork() == 0:
                    time.sleep(600)
                n += 1
        except OSError:
            pass
        print(n, flush=True)
        time.sleep(600)
        """
        group = start(train, max_processes=24)
        assert not group.wait(1.0)
        # As somebody's own user, what else runs for that user counts as well.
        bound = 24 if os.geteuid() == 0 or sandbox.name == "docker" else 60
        assert 0 < int(group.log()[0]) < bound
        group.close()
        assert all_gone(sandbox)

    def test_a2_what_keeps_forking_and_exiting_cannot_slip_away(
        self, start: Start, sandbox: AnySandbox
    ) -> None:
        train = """
        import os
        while True:
            if os.fork() != 0:
                os._exit(0)
        """
        group = start(train, max_processes=4000)  # those that ended count until waited for
        assert group.wait(PATIENCE)
        # It is never the same process when it is looked for; with a user of its own, that tells.
        owner = getattr(group, "_owner", None)
        if owner is not None and sandbox.name == "process":
            assert has_processes(owner)
        group.freeze()
        assert group.close().code == 0
        assert all_gone(sandbox)
        assert owner is None or not has_processes(owner)

    def test_a3_a4_a_child_that_hogs_memory_is_killed_and_said_to_have(self, start: Start) -> None:
        train = """
        import os, time
        if os.fork() == 0:
            hoard = []
            while True:
                hoard.append(b"x" * 20_000_000)
                time.sleep(0.02)
        os.wait()
        """
        group = start(train, memory_mb=200)
        assert group.wait(PATIENCE)
        ended = group.close()
        assert ended.out_of_memory

    def test_a3_an_allocation_that_fails_is_said_to_have(self, start: Start) -> None:
        group = start("b'x' * 2**45")
        assert group.wait(PATIENCE)
        assert "MemoryError" in group.log()[0]
        assert group.close().out_of_memory

    def test_a12_a_flood_of_output_is_cut_to_its_end(self, start: Start) -> None:
        group = start("print('y' * 20_000_000)\nprint('the end')", log_bytes=1000)
        assert group.wait(PATIENCE)
        text, truncated = group.log()
        assert truncated
        assert len(text) == 1000
        assert text.endswith("the end\n")

    @only_supervised
    def test_a_group_whose_supervisor_is_killed_is_gone_too(
        self, start: Start, sandbox: SupervisedSandbox
    ) -> None:
        train = """
        import os, time
        if os.fork() == 0:
            os.setsid()
        time.sleep(600)
        """
        group = start(train)
        (supervisor,) = [
            p.pid for p in alive(sandbox._fork_server.pid) if p.parent == sandbox._fork_server.pid
        ]
        os.kill(supervisor, signal.SIGKILL)
        assert group.wait(PATIENCE)
        assert group.close().code is None
        assert all_gone(sandbox)

    @only_supervised
    def test_a_supervisor_that_does_not_answer_is_no_sign_that_its_group_is_gone(
        self, start: Start, sandbox: SupervisedSandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        group = start("while True: pass")
        (supervisor,) = [
            p.pid for p in alive(sandbox._fork_server.pid) if p.parent == sandbox._fork_server.pid
        ]
        monkeypatch.setattr(group_module, "ANSWER_SECONDS", 0.2)
        os.kill(supervisor, signal.SIGSTOP)
        with pytest.raises(InfrastructureFailure, match="does not answer"):
            group.freeze()
        with pytest.raises(InfrastructureFailure, match="survived"):
            group.close()
        assert all_gone(sandbox)

    @needs_root
    def test_a_candidate_cannot_stop_who_is_about_to_stop_it(self) -> None:
        uid = UID + 77
        ready, ready_end = os.pipe()
        signaller = os.fork()
        if signaller == 0:
            become_signaller(uid)
            os.write(ready_end, b"R")
            time.sleep(600)
        assert os.read(ready, 1) == b"R"
        candidate = os.fork()
        if candidate == 0:
            become(uid)
            outcome = b"stopped it"
            try:
                os.kill(signaller, signal.SIGSTOP)
            except PermissionError:
                outcome = b"refused"
            os.write(ready_end, outcome)
            time.sleep(600)
        try:
            assert os.read(ready, 100) == b"refused"
            assert has_processes(uid)
            signal_user(uid, signal.SIGKILL)
            status = os.waitpid(candidate, 0)[1]
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        finally:
            os.kill(signaller, signal.SIGKILL)
            os.waitpid(signaller, 0)
            os.close(ready)
            os.close(ready_end)

    @only_supervised  # in a container, the files themselves lie in memory
    def test_a_mapped_file_larger_than_the_memory_limit_is_no_reason_to_kill(
        self, start: Start
    ) -> None:
        train = """
        import mmap, os, time
        with open("out/file", "wb") as file:
            file.truncate(200_000_000)
        with open("out/file", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            assert set(mapped[::4096]) == {0}
            time.sleep(1)
        """
        if "tmpfs" in subprocess.getoutput(f"stat -f -c %T {tempfile.gettempdir()}"):
            pytest.skip("here, the files themselves lie in memory")
        group = start(train, memory_mb=120, file_mb=300)
        assert group.wait(PATIENCE)
        ended = group.close()
        assert (ended.code, ended.out_of_memory) == (0, False)

    def test_waiting_for_a_cpu_that_others_hold_is_told(self, start: Start) -> None:
        rival = subprocess.Popen(
            [sys.executable, "-c", "import os\nos.sched_setaffinity(0, [0])\nwhile True: pass"]
        )
        try:
            group = start("while True: pass")
            assert not group.wait(1.5)
            assert group.close().run_delay_seconds > 0.2
        finally:
            rival.kill()
            rival.wait()


class TestFreezingAndCollecting:
    def test_c7_a_frozen_candidate_writes_nothing_more(self, start: Start, tmp_path: Path) -> None:
        train = """
        import os
        os.fork()
        with open("out/ticks", "ab", buffering=0) as file:
            while True:
                file.write(b".")
        """
        group = start(train)
        assert not group.wait(0.5)
        group.freeze()
        first = taken(group, tmp_path, "ticks")
        time.sleep(0.2)
        assert taken(group, tmp_path, "ticks") == first
        assert first["ticks"]

    def test_c7_collecting_freezes_what_still_runs(self, start: Start, tmp_path: Path) -> None:
        group = start("while True: open('out/ticks', 'ab').write(b'.')")
        assert not group.wait(0.5)
        first = taken(group, tmp_path, "ticks")
        time.sleep(0.2)
        assert taken(group, tmp_path, "ticks") == first

    def test_files_are_taken_after_the_end_and_not_after_closing(
        self, start: Start, tmp_path: Path
    ) -> None:
        group = start("open('out/model.json', 'w').write('{}')")
        assert group.wait(PATIENCE)
        assert taken(group, tmp_path, "model.json") == {"model.json": b"{}"}
        assert "absent" in group.collect(["absent"], tmp_path, 10)
        group.close()
        with pytest.raises(InfrastructureFailure):
            group.collect(["model.json"], tmp_path, 10)

    def test_c1_c2_c3_c5_what_is_no_plain_file_is_refused(
        self, start: Start, tmp_path: Path
    ) -> None:
        train = """
        import os, socket
        os.symlink("/etc/passwd", "out/link")
        os.mkfifo("out/pipe")
        socket.socket(socket.AF_UNIX).bind("out/socket")
        os.mkdir("out/folder")
        with open("out/sparse", "wb") as file:
            file.truncate(10**12)
        open("out/plain", "w").write("good")
        """
        group = start(train, file_mb=2_000_000)
        assert group.wait(PATIENCE)
        assert group.log()[0] == ""
        bad = ["link", "pipe", "socket", "folder", "sparse"]
        odd = ["", ".", "..", "../job.json", "folder/../plain", "a\0b", "n" * 256, "none\n"]
        before = time.monotonic()
        refused = group.collect([*bad, *odd, "plain"], tmp_path, 1000)
        assert time.monotonic() - before < PATIENCE / 2
        assert list(refused) == [*bad, *odd]
        assert all(refused.values())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]

    def test_c3_the_limit_is_on_all_files_together(self, start: Start, tmp_path: Path) -> None:
        group = start("for name in 'abc': open(f'out/{name}', 'w').write('x' * 40)")
        assert group.wait(PATIENCE)
        assert list(group.collect("abc", tmp_path, 100)) == ["c"]

    def test_c4_a_link_to_what_is_not_its_own_brings_nothing(
        self, start: Start, tmp_path: Path
    ) -> None:
        (tmp_path / "secret").write_text("secret")
        train = """
        import os
        try: os.link("in/secret", "out/secret")
        except OSError: print("refused")
        """
        group = start(train, inputs={"secret": tmp_path / "secret"})
        assert group.wait(PATIENCE)
        if os.geteuid() == 0:
            assert "secret" in group.collect(["secret"], tmp_path / "taken", 100)

    def test_c1_another_folder_in_the_place_of_out_is_not_looked_into(
        self, start: Start, tmp_path: Path
    ) -> None:
        train = """
        import os
        try:
            os.chmod(".", 0o700)
            os.rename("out", "tmp/out")
            os.symlink("/etc", "out")
        except OSError: pass
        """
        group = start(train)
        assert group.wait(PATIENCE)
        assert "passwd" in group.collect(["passwd"], tmp_path, 1_000_000)


class TestConfinement:
    def test_a15_the_harness_secrets_are_not_to_be_found(self, start: Start) -> None:
        train = """
        import glob, os
        print(dict(os.environ))
        for path in glob.glob("/proc/*/environ") if %d else ["/proc/self/environ"]:
            try: print(open(path).read())
            except OSError: pass
        """
        group = start(train % (os.geteuid() == 0))
        assert group.wait(PATIENCE)
        text = group.log()[0]
        assert "OMP_NUM_THREADS" in text
        assert CANARY not in text

    @needs_root
    def test_a13_nothing_can_be_written_outside_out_and_temp(
        self, start: Start, tmp_path: Path
    ) -> None:
        tmp_path.chmod(0o777)
        (tmp_path / "input").write_text("input")
        train = """
        import json, os, sys
        def works(path):
            try: open(path, "a").close()
            except OSError: return False
            return True
        outside = ["job.json", "code/train.py", "code/new", "in/input", "in/new", "new", "/usr/new",
                   "/etc/new", "/home/new", "/new", "/proc/sys/kernel/hostname", *sys.argv[2:]]
        for folder in ("code", "in", "."):
            try: os.chmod(folder, 0o777)
            except OSError: pass
        inside = ["out/new", "/tmp/new", os.environ["TMPDIR"] + "/new2", "/dev/null"]
        print(json.dumps([[p for p in outside if works(p)], [p for p in inside if not works(p)]]))
        """
        group = start(train, inputs={"input": tmp_path / "input"})
        assert printed(group) == [[], []]

    @needs_root
    def test_a13_what_is_left_in_shared_folders_is_gone(self, start: Start) -> None:
        name = f"left-by-a-candidate-{os.getpid()}"
        places = [Path(folder) / name for folder in ("/tmp", "/var/tmp", "/dev/shm")]
        group = start(f"for path in {list(map(str, places))}: open(path, 'w').close()")
        assert group.wait(PATIENCE)
        group.close()
        assert [path for path in places if path.exists()] == []

    @needs_root
    def test_a14_it_is_nobody_and_cannot_become_anybody(self, start: Start) -> None:
        train = """
        import json, os
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        try: os.setuid(0); became = True
        except OSError: became = False
        print(json.dumps([os.getuid(), int(status["CapEff"], 16), status["NoNewPrivs"].strip(),
                          os.getgid(), os.getgroups(), became]))
        """
        uid, capabilities, no_new_privileges, group, groups, became = printed(start(train))
        assert min(uid, group) >= UID
        assert (capabilities, no_new_privileges, became) == (0, "1", False)
        assert set(groups) <= {65534, group}  # nobody's, and its own

    def test_a1_there_is_no_network(self, start: Start, sandbox: AnySandbox) -> None:
        if not sandbox.isolated:
            pytest.skip("without root, the process sandbox leaves the network open")
        train = """
        import json, socket
        devices = [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]
        try: socket.create_connection(("192.0.2.1", 80), timeout=2); reached = True
        except OSError: reached = False
        print(json.dumps([devices, reached]))
        """
        assert printed(start(train)) == [["lo"], False]

    def test_a15_no_process_but_its_own_is_to_be_seen(
        self, start: Start, sandbox: AnySandbox
    ) -> None:
        if not sandbox.isolated:
            pytest.skip("without root, the process sandbox hides no process")
        train = """
        import glob, json, os
        if os.fork() == 0: os._exit(0)
        open("/proc/self/environ").read()
        lines = [open(path, "rb").read() for path in glob.glob("/proc/[0-9]*/cmdline")]
        print(json.dumps(sum(b"pytest" in line for line in lines)))
        """
        assert Path("/proc/self/cmdline").read_bytes()
        assert printed(start(train)) == 0

    @needs_root
    def test_b12_hidden_folders_are_not_there(self, kind: str) -> None:
        with tempfile.TemporaryDirectory(dir=A_PUBLIC_PLACE) as folder:
            os.chmod(folder, 0o755)
            held_out = Path(folder, "val.bin")
            held_out.write_text("what is to be predicted")
            train = f"import os, json; print(json.dumps(os.path.exists({str(held_out)!r})))"
            genome = Genome.of({"train.py": train, "model.py": ""})
            launch = Launch("peek", Zone.TRAIN, genome, {}, {}, Limits())
            for hidden in ((Path(folder),), ()):
                sandbox = build(kind, hidden=hidden)
                visible = printed(sandbox.start(launch))
                sandbox.close()
                # The control: a public file is seen where nothing hides it.
                assert visible == (not hidden and kind == "process")

    @needs_root
    def test_b12_hidden_files_cannot_be_read(self, tmp_path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=A_PUBLIC_PLACE) as folder:
            os.chmod(folder, 0o755)
            secret, public = Path(folder, "memory.sqlite"), Path(folder, "public")
            secret.write_text("secret")
            public.write_text("public")
            train = f"""
            for path in {[str(secret), str(public)]}:
                try: print(open(path).read())
                except OSError: pass
            """
            genome = Genome.of({"train.py": textwrap.dedent(train), "model.py": ""})
            sandbox = build("process", hidden=(secret, Path(folder, "absent")))
            if not sandbox.isolated:
                sandbox.close()
                pytest.skip("nothing can be hidden here")
            group = sandbox.start(Launch("peek", Zone.TRAIN, genome, {}, {}, Limits()))
            assert group.wait(PATIENCE)
            assert group.log()[0].split() == ["public"]
            sandbox.close()

    def test_b12_what_is_hidden_in_a_folder_that_bubblewrap_shows_is_covered(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as name:
            shown = Path(name).resolve()
            shown.chmod(0o755)
            (shown / "runs").mkdir()
            for file in ("runs/key", "memory", "public"):
                (shown / file).write_text("text")
            folders = [*interpreter_folders(), shown]
            monkeypatch.setattr(bubblewrap, "interpreter_folders", lambda: folders)
            train = f"""
            for name in ("runs/key", "memory", "public"):
                try:
                    if open({name!r} + "/" + name).read(): print(name)
                except OSError: pass
            """
            genome = Genome.of({"train.py": textwrap.dedent(train), "model.py": ""})
            # Not told to the fork server, whose house would hide them first where it has one.
            sandbox = build("bubblewrap")
            for hidden, seen in (
                ((), ["runs/key", "memory", "public"]),
                ((shown / "runs", shown / "memory", shown / "absent"), ["public"]),
            ):
                sandbox._hidden = hidden
                group = sandbox.start(Launch("peek", Zone.TRAIN, genome, {}, {}, Limits()))
                assert group.wait(PATIENCE)
                assert group.log()[0].split() == seen
                group.close()
            sandbox.close()

    def test_in_a_container_no_further_user_namespace_can_be_made(self) -> None:
        sandbox = build("bubblewrap")
        bwrap = shutil.which("bwrap")
        assert bwrap is not None
        if not bubblewrap._no_nesting(bwrap):
            sandbox.close()
            pytest.skip("this bwrap cannot prevent it")
        train = "import ctypes; print(ctypes.CDLL(None).unshare(0x10000000))"
        genome = Genome.of({"train.py": train, "model.py": ""})
        assert printed(sandbox.start(Launch("nest", Zone.TRAIN, genome, {}, {}, Limits()))) == -1
        sandbox.close()

    def test_a9_no_file_grows_past_its_limit(self, start: Start, tmp_path: Path) -> None:
        train = """
        with open("out/file", "wb", buffering=0) as file:
            try:
                while True: file.write(b"x" * 100_000)
            except OSError as error: print(error.strerror)
        """
        group = start(train, file_mb=1)
        assert group.wait(PATIENCE)
        assert group.log()[0] in ("File too large\n", "No space left on device\n")
        assert len(taken(group, tmp_path, "file")["file"]) <= 1 << 20


class TestTheChannel:
    def test_a_model_program_answers_what_it_is_sent(self, start: Start, tmp_path: Path) -> None:
        group = start(zone=Zone.MODEL, job={"manner": "echo"})
        # A pipe holds less, so that both ends must keep at it.
        for data in (b"ab", os.urandom(3_000_000)):
            deadline = time.monotonic() + PATIENCE
            group.send(len(data).to_bytes(8, "little") + data[:1], deadline)
            group.send(data[1:], deadline)
            assert group.receive(len(data), deadline) == data

    def test_a_model_program_finds_its_inputs(self, start: Start, tmp_path: Path) -> None:
        (tmp_path / "weights").write_text("w")
        inputs = {"model.safetensors": tmp_path / "weights"}
        group = start(zone=Zone.MODEL, job={"manner": "inputs"}, inputs=inputs)
        told = json.loads(group.receive(200, time.monotonic() + PATIENCE))
        assert told["in"] == ["model.safetensors"]
        assert str(tmp_path) not in told["cwd"]

    def test_silence_is_a_timeout(self, start: Start) -> None:
        group = start(zone=Zone.MODEL, job={"manner": "silent"})
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            group.receive(1, before + 0.3)
        with pytest.raises(TimeoutError):
            group.send(b"x" * 10_000_000, time.monotonic() + 0.3)
        assert 0.6 <= time.monotonic() - before < PATIENCE

    @pytest.mark.parametrize("manner", ["raise", "half"])
    def test_an_end_is_an_end_of_file(self, start: Start, manner: str) -> None:
        group = start(zone=Zone.MODEL, job={"manner": manner})
        with pytest.raises(EOFError):
            group.receive(10, time.monotonic() + PATIENCE)
        assert group.wait(PATIENCE)
        with pytest.raises(EOFError):
            group.send(b"x" * 10_000_000, time.monotonic() + PATIENCE)
        assert group.close().code == (1 if manner == "raise" else 0)

    def test_training_has_no_channel(self, start: Start) -> None:
        group = start("pass")
        with pytest.raises(InfrastructureFailure):
            group.receive(1, time.monotonic() + 1)


class TestClosing:
    @pytest.mark.parametrize("what", ["wait", "receive", "send"])
    def test_closing_the_sandbox_from_another_thread_ends_every_wait(
        self, kind: str, what: str
    ) -> None:
        sandbox = build(kind, server=GENOMES / "echo_server.py")
        genome = Genome.of({"train.py": "", "model.py": ""})
        launch = Launch("m", Zone.MODEL, genome, {}, {"manner": "silent"}, Limits())
        group = sandbox.start(launch)
        closer = threading.Timer(0.3, sandbox.close)
        closer.start()
        deadline = time.monotonic() + 600
        if what == "wait":
            assert group.wait(600)
        elif what == "receive":
            with pytest.raises(EOFError):
                group.receive(1, deadline)
        else:
            with pytest.raises(EOFError):
                group.send(b"x" * 10_000_000, deadline)
        closer.join(PATIENCE)
        assert not closer.is_alive()
        assert not sandbox._root.path.exists()
        with pytest.raises(InfrastructureFailure):
            sandbox.start(launch)
        sandbox.close()

    def test_a_sandbox_that_is_dropped_cleans_up_after_itself(self, kind: str) -> None:
        sandbox = build(kind)
        genome = Genome.of({"train.py": "while True: pass", "model.py": ""})
        group = sandbox.start(Launch("dropped", Zone.TRAIN, genome, {}, {}, Limits()))
        present, folder = roll_call(sandbox), sandbox._root.path
        assert len(present()) >= 2  # who watches and who is watched, or a container and its volume
        before = time.monotonic()
        del sandbox
        assert present() == []
        assert not folder.exists()
        assert group.close().code is None
        assert time.monotonic() - before < PATIENCE

    @pytest.mark.parametrize("kind", SUPERVISED)  # of containers, test_docker.py tells
    def test_d4_a_harness_killed_outright_leaves_no_process(self, kind: str) -> None:
        build(kind).close()  # skips where it cannot work
        harness = subprocess.Popen(
            [sys.executable, GENOMES / "lone_harness.py", kind],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
            text=True,
        )
        assert harness.stdout is not None
        said = harness.stdout.readline().split()
        fork_server, folder = int(said[0]), Path(said[1])
        assert folder.is_dir()
        members = [fork_server, *(process.pid for process in alive(fork_server))]
        assert len(members) >= 4  # the fork server, a supervisor, the candidate, its daemon
        harness.kill()
        harness.wait()
        harness.stdout.close()
        deadline = time.monotonic() + PATIENCE
        left = members
        while left and time.monotonic() < deadline:
            time.sleep(0.05)
            found = {pid: Process.read(pid) for pid in members}
            left = [pid for pid, process in found.items() if process and process.state != "Z"]
        assert left == []
        assert not folder.exists()
