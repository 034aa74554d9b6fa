"""The parts of the container sandbox that need no engine: streams, archives, owners, messages."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.protocols import InfrastructureFailure, Zone
from darwin_exp.sandbox import archive, docker, engine, engine_calls, keeper, reaping
from darwin_exp.sandbox.cgroup import Books
from darwin_exp.sandbox.confinement import become
from darwin_exp.sandbox.engine import State
from darwin_exp.sandbox.engine_calls import EngineFailure, EngineUnavailable
from darwin_exp.sandbox.processes import descendants
from darwin_exp.sandbox.removal import Removals
from darwin_exp.sandbox.stream import MAX_UNREAD_BYTES, Stream
from darwin_exp.sandbox.workfolder import WorkRoot

TOKEN = "0123456789abcdef"
END = keeper.mark(TOKEN) + keeper.status_text(-11)
PATIENCE = 20.0


def frame(output: int, content: bytes) -> bytes:
    return struct.pack(">BxxxL", output, len(content)) + content


def comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


class Feed:
    """A stream, and the engine's end of it."""

    def __init__(self, zone: Zone, log_bytes: int = 1000) -> None:
        self.interrupt = os.eventfd(0, os.EFD_NONBLOCK)
        ours, self.engine = socket.socketpair()
        ours.setblocking(False)
        self.stream = Stream(zone, TOKEN, log_bytes, self.interrupt)
        self.stream.attach(ours)

    def give(self, data: bytes) -> None:
        self.engine.sendall(data)
        self.stream.pump(time.monotonic() + PATIENCE)

    def close(self) -> None:
        self.stream.close()
        self.engine.close()
        os.close(self.interrupt)


@pytest.fixture
def feed(request: pytest.FixtureRequest) -> Iterator[Feed]:
    feed = Feed(getattr(request, "param", Zone.TRAIN))
    yield feed
    feed.close()


class TestTheStream:
    @pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 30, 1000])
    def test_frames_mean_the_same_however_they_are_cut(self, feed: Feed, size: int) -> None:
        said = [
            frame(1, b"R"),
            frame(2, b"first\n"),
            frame(2, b""),
            frame(2, b"second\0" + END[:5]),
            frame(2, END[5:]),
            frame(2, b"afterwards"),
        ]
        data = b"".join(said)
        for begin in range(0, len(data), size):
            feed.give(data[begin : begin + size])
        assert feed.stream.ready_at > 0
        assert feed.stream.status == -11
        assert feed.stream.log.text() == "first\nsecond\0afterwards"
        assert not feed.stream.over

    def test_what_only_resembles_the_mark_is_printed(self, feed: Feed) -> None:
        feed.give(frame(2, END[:-8]))
        feed.give(frame(2, b"!\0\0"))
        feed.give(frame(2, b"?"))
        assert feed.stream.log.text().encode() == END[:-8] + b"!\0\0?"
        assert feed.stream.status is None

    @pytest.mark.parametrize(
        ("word", "status"),
        [
            (b"fine!!", 1),
            (b"-00077", 1),  # no such signal
            (b"-99999", 1),
            (b"+00256", 1),
            (b"-00064", -64),
            (b"+00255", 255),
        ],
    )
    def test_a_bad_imitation_of_the_keeper_is_a_crash(
        self, feed: Feed, word: bytes, status: int
    ) -> None:
        feed.give(frame(2, keeper.mark(TOKEN) + word))
        assert feed.stream.status == status

    def test_garbage_where_only_the_ready_signal_is_due_is_nothing(self, feed: Feed) -> None:
        feed.give(frame(1, b"R" + END) + frame(1, os.urandom(5000)) + frame(3, b"from the engine"))
        assert feed.stream.status is None
        assert feed.stream.n_unread == 0
        assert feed.stream.log.text() == "from the engine"

    @pytest.mark.parametrize("feed", [Zone.MODEL], indirect=True)
    def test_answers_are_apart_from_what_is_printed_and_hold_no_mark(self, feed: Feed) -> None:
        feed.give(frame(1, b"Rab") + frame(2, END) + frame(1, END))
        assert feed.stream.take(2) == b"ab"
        assert feed.stream.take(100) == END
        assert feed.stream.status is None

    def test_an_end_in_the_middle_of_a_frame_is_an_end(self, feed: Feed) -> None:
        feed.engine.sendall(frame(2, b"abc")[:-1])
        feed.engine.shutdown(socket.SHUT_RDWR)
        while not feed.stream.over:
            feed.stream.pump(time.monotonic() + PATIENCE)
        assert feed.stream.log.text() == "ab"

    def test_the_interrupt_ends_a_wait(self, feed: Feed) -> None:
        threading.Timer(0.1, os.eventfd_write, (feed.interrupt, 1)).start()
        with pytest.raises(InterruptedError):
            feed.stream.pump(time.monotonic() + 600)

    @pytest.mark.parametrize("feed", [Zone.MODEL], indirect=True)
    def test_unread_answers_are_bounded_but_those_asked_for_are_read(self, feed: Feed) -> None:
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                try:
                    feed.engine.sendall(frame(1, b"x" * 60_000))
                except OSError:
                    return

        flooding = threading.Thread(target=flood)
        flooding.start()
        while not feed.stream.is_full():
            feed.stream.pump(time.monotonic() + PATIENCE)
        bound = feed.stream.n_unread
        assert bound < MAX_UNREAD_BYTES + (1 << 20)
        assert feed.stream.pump(time.monotonic() + 0.1) == 0
        assert feed.stream.n_unread == bound
        wanted = 2 * MAX_UNREAD_BYTES
        while feed.stream.n_unread < wanted:
            feed.stream.pump(time.monotonic() + PATIENCE, select.POLLIN, wanted)
        assert len(feed.stream.take(wanted)) == wanted
        stop.set()
        feed.engine.shutdown(socket.SHUT_RDWR)
        flooding.join(PATIENCE)
        assert not flooding.is_alive()


def packed(*members: tuple[str, bytes, bytes]) -> Iterator[bytes]:
    """Yield an archive of (name, type, content), a few bytes at a time."""
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size, member.linkname = kind, len(content), "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    for begin in range(0, len(body.getvalue()), 700):
        yield body.getvalue()[begin : begin + 700]


def announcement(**changes: Any) -> str:
    told = {"name": "a", "size": 5, "mode": 0o600, "linkTarget": ""} | changes
    return b64encode(json.dumps(told).encode()).decode()


class TestTheArchive:
    def test_a_plain_file_is_written(self, tmp_path: Path) -> None:
        content = os.urandom(100_000)
        archive.unpack(packed(("a", tarfile.REGTYPE, content)), "a", 100_000, tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == content

    @pytest.mark.parametrize(
        "members",
        [
            (),
            (("b", tarfile.REGTYPE, b"12345"),),
            (("a", tarfile.REGTYPE, b"1234"),),
            (("a", tarfile.SYMTYPE, b""),),
            (("a", tarfile.LNKTYPE, b""),),
            (("a", tarfile.FIFOTYPE, b""),),
            (("a", tarfile.REGTYPE, b"12345"), ("b", tarfile.REGTYPE, b"")),
        ],
    )
    def test_c8_what_was_not_announced_is_refused_and_leaves_nothing(
        self, tmp_path: Path, members: tuple[tuple[str, bytes, bytes], ...]
    ) -> None:
        with pytest.raises(archive.Surprise):
            archive.unpack(packed(*members), "a", 5, tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_c8_an_archive_that_breaks_off_is_refused(self, tmp_path: Path) -> None:
        whole = b"".join(packed(("a", tarfile.REGTYPE, b"1" * 5000)))
        with pytest.raises(archive.Surprise):
            archive.unpack(iter([whole[:3000]]), "a", 5000, tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("bit", [31, 27, 26, 25, 24, 21, 19])
    def test_c1_c2_what_is_announced_as_no_plain_file_is_not_asked_for(self, bit: int) -> None:
        assert archive.announced_size(announcement(), 5) == 5
        with pytest.raises(ValueError, match="plain"):
            archive.announced_size(announcement(mode=0o600 | 1 << bit), 5)

    def test_c3_what_is_too_long_is_not_asked_for(self) -> None:
        with pytest.raises(ValueError, match="1000000000000 bytes"):
            archive.announced_size(announcement(size=10**12), 5)

    @pytest.mark.parametrize("told", ["", "e30=", "no base64", "bnVsbA=="])
    def test_nothing_is_read_that_was_not_announced(self, told: str) -> None:
        with pytest.raises(archive.Surprise):
            archive.announced_size(told, 5)
        with pytest.raises(archive.Surprise):
            archive.is_folder(told)

    @pytest.mark.parametrize(
        ("mode", "folder"), [(0o700 | 1 << 31, True), (1 << 31 | 1 << 27, False), (0o600, False)]
    )
    def test_c1_a_folder_is_told_from_a_link_to_one(self, mode: int, folder: bool) -> None:
        assert archive.is_folder(announcement(mode=mode)) == folder


Member = tuple[str, bytes, bytes]
HEAD: Member = ("out", tarfile.DIRTYPE, b"")
WANTED = frozenset({"a", "m", "z"})


def file(name: str, content: bytes = b"12345") -> Member:
    return (f"out/{name}", tarfile.REGTYPE, content)


def taken(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestTheArchiveOfAFolder:
    def test_wanted_files_are_written_and_a_few_others_are_read_past(self, tmp_path: Path) -> None:
        content = os.urandom(100_000)
        strays = [file(f"b{n}", b"?" * 1000) for n in range(archive.MAX_STRAYS - 2)]
        body = packed(HEAD, file("a"), *strays, file("m", content), file("n"))
        found = archive.unpack_folder(body, "out", WANTED, 100_005, tmp_path)
        assert found == {"a": 5, "m": 100_000}  # and no "z", up to the end
        assert taken(tmp_path) == {"a": b"12345", "m": content}

    @pytest.mark.parametrize(
        "members",
        [
            (HEAD, file("a"), ("out/m", tarfile.SYMTYPE, b"")),
            (HEAD, file("a"), ("out/m", tarfile.LNKTYPE, b"")),
            (HEAD, file("a"), ("out/l", tarfile.FIFOTYPE, b"")),
            (HEAD, file("a"), ("out/b", tarfile.DIRTYPE, b"")),
            (HEAD, file("a"), file("b/m")),
            (HEAD, file("a"), ("m", tarfile.REGTYPE, b"12345")),
            (HEAD, file("a"), ("../m", tarfile.REGTYPE, b"12345")),
            (HEAD, file("a"), ("/etc/m", tarfile.REGTYPE, b"12345")),
            (HEAD, file("a"), file("a")),
            (HEAD, file("a"), file("m", b"123456")),  # one more than all together may have
            (HEAD, file("a"), file("b", bytes(archive.MAX_STRAY_BYTES + 1)), file("m")),
            (HEAD, file("a"), *(file(f"b{n}") for n in range(archive.MAX_STRAYS)), file("m")),
            (HEAD, file("a"), *(HEAD for _ in range(archive.MAX_STRAYS)), file("m")),
        ],
    )
    def test_c1_c2_c3_c4_c8_where_something_else_is_met_nothing_is_kept(
        self, tmp_path: Path, members: tuple[Member, ...]
    ) -> None:
        with pytest.raises(archive.Untidy):
            archive.unpack_folder(packed(*members), "out", WANTED, 10, tmp_path)
        assert taken(tmp_path) == {}

    @pytest.mark.parametrize("size", [10, 1000, 2000, 3000])
    def test_c8_an_archive_that_breaks_off_leaves_nothing_or_what_is_whole(
        self, tmp_path: Path, size: int
    ) -> None:
        whole = b"".join(packed(HEAD, file("a"), file("m", b"1" * 5000)))
        try:
            found = archive.unpack_folder(iter([whole[:size]]), "out", WANTED, 10_000, tmp_path)
        except archive.Untidy:
            found = {}
        assert found in ({}, {"a": 5})
        assert taken(tmp_path) == dict.fromkeys(found, b"12345")

    @pytest.mark.parametrize("name", ["a", "b"])
    def test_c3_not_a_byte_is_waited_for_of_what_is_too_long(
        self, tmp_path: Path, name: str
    ) -> None:
        member = tarfile.TarInfo(f"out/{name}")
        member.size = 10**12
        n_read = 0

        def endless() -> Iterator[bytes]:
            nonlocal n_read
            yield member.tobuf(tarfile.GNU_FORMAT)
            while True:
                n_read += 1 << 16
                yield bytes(1 << 16)

        with pytest.raises(archive.Untidy):
            archive.unpack_folder(endless(), "out", WANTED, 1000, tmp_path)
        assert n_read <= 2 * archive.CHUNK_BYTES  # what comes together with its head

    def test_c3_nothing_is_waited_for_behind_the_last_wanted_file(self, tmp_path: Path) -> None:
        n_read = 0

        def endless() -> Iterator[bytes]:
            nonlocal n_read
            yield from packed(HEAD, file("a"))
            while True:
                n_read += 1 << 16
                yield bytes(1 << 16)

        assert archive.unpack_folder(endless(), "out", frozenset("a"), 10, tmp_path) == {"a": 5}
        assert n_read <= 2 * archive.CHUNK_BYTES


# As the first process of a container would, it becomes the parent of those whose own has ended.
AS_THE_FIRST = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
os.execv(sys.executable, [sys.executable, "-I", "-S", *sys.argv[1:]])
"""

# What a program does that others start without end, and that ends when the keeper does.
LEAVES_STRAYS = """
import os
parent = os.getppid()
os.write(2, b"ready")
while os.getppid() == parent:
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(9)
        os._exit(0)
    os.wait()
"""


@contextlib.contextmanager
def kept(folder: Path, zone: Zone, program: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the keeper as a container does, with a program of ours for the launcher."""
    script, launcher = folder / "keeper.py", folder / "launcher.py"
    launcher.write_text(textwrap.dedent(program))
    script.write_text(Path(keeper.__file__).read_text().replace(keeper.LAUNCHER, str(launcher)))
    command = [sys.executable, "-c", AS_THE_FIRST, str(script), TOKEN, zone.value]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


class TestTheKeeper:
    def test_the_end_is_told_behind_all_that_was_printed_and_strays_are_waited_for(
        self, tmp_path: Path
    ) -> None:
        program = """
        import os
        for _ in range(20):
            if os.fork() == 0:
                if os.fork() == 0:
                    os._exit(9)
                os._exit(0)
            os.wait()
        os.write(2, b"printed")
        os._exit(3)
        """
        with kept(tmp_path, Zone.TRAIN, program) as process:
            assert process.stdin is not None
            assert process.stderr is not None
            said = b"printed" + keeper.mark(TOKEN) + keeper.status_text(3)
            assert process.stderr.read(len(said)) == said
            assert comes_true(lambda: not descendants(process.pid))
            assert process.poll() is None
            process.stdin.close()
            assert process.wait(PATIENCE) == keeper.FORSAKEN_CODE

    def test_the_end_is_told_through_a_full_pipe_that_was_set_not_to_wait(
        self, tmp_path: Path
    ) -> None:
        program = """
        import os
        os.set_blocking(2, False)
        try:
            while True:
                os.write(2, b"x" * 4096)
        except BlockingIOError:
            os._exit(0)
        """
        with kept(tmp_path, Zone.TRAIN, program) as process:
            assert process.stderr is not None
            said, end = b"", keeper.mark(TOKEN) + keeper.status_text(0)
            time.sleep(0.5)  # nobody reads, and it has to wait
            while not said.endswith(end):
                chunk = os.read(process.stderr.fileno(), 1 << 16)
                assert chunk, said[-300:]
                said += chunk

    @pytest.mark.parametrize(
        ("end", "code"),
        [
            ("os._exit(3)", 3),
            ("os.kill(os.getpid(), 9)", 128 + 9),
            (f"os._exit({keeper.FORSAKEN_CODE})", 1),  # its own doing, and not the harness's
        ],
    )
    def test_how_a_model_program_ends_is_how_its_keeper_does(
        self, tmp_path: Path, end: str, code: int
    ) -> None:
        program = f"import os\nos.write(5, os.read(4, 4))\n{end}"
        with kept(tmp_path, Zone.MODEL, program) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"ping")
            process.stdin.flush()
            assert process.stdout.read() == b"ping"
            assert process.wait(PATIENCE) == code

    @pytest.mark.parametrize("zone", list(Zone))
    def test_d4_it_ends_with_its_standard_input_whatever_is_unread_and_whoever_ends(
        self, tmp_path: Path, zone: Zone
    ) -> None:
        with kept(tmp_path, zone, LEAVES_STRAYS) as process:
            assert process.stdin is not None
            assert process.stderr is not None
            assert process.stderr.read(5) == b"ready"
            process.stdin.write(b"unread")
            process.stdin.close()
            assert process.wait(PATIENCE) == keeper.FORSAKEN_CODE

    def test_a8_it_handles_no_signal_but_that_of_an_end(self, tmp_path: Path) -> None:
        # The first process gets no other from inside its container.
        with kept(tmp_path, Zone.TRAIN, LEAVES_STRAYS) as process:
            assert process.stderr is not None
            assert process.stderr.read(5) == b"ready"
            status = Path(f"/proc/{process.pid}/status").read_text()
            told = dict(line.split(":", 1) for line in status.splitlines())
            handled = int(told["SigCgt"], 16) & ((1 << 31) - 1)  # above are the C library's own
            assert handled == 1 << (signal.SIGCHLD - 1)


def a_dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


class TestOwners:
    def test_the_living_and_the_dead_are_told_apart(self) -> None:
        boot, namespace, pid, started = reaping.owner().split(":")
        assert reaping.is_dead(reaping.owner()) is False
        assert reaping.is_dead(f"{boot}:{namespace}:{a_dead_process()}:{started}") is True
        # The same id, used again by another process.
        assert reaping.is_dead(f"{boot}:{namespace}:{pid}:1") is True
        assert reaping.is_dead(f"another boot:{namespace}:{pid}:{started}") is True
        assert reaping.is_dead(f"{boot}:1:{pid}:{started}") is None
        assert reaping.is_dead("nonsense") is None

    def test_a_process_that_ended_and_was_not_waited_for_is_dead(self) -> None:
        boot, namespace, _, _ = reaping.owner().split(":")
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        started = reaping._started(child.pid)
        name = f"{boot}:{namespace}:{child.pid}:{started}"
        assert reaping.is_dead(name) is False
        child.kill()
        assert comes_true(lambda: bool(reaping.is_dead(name)))
        child.communicate()

    def test_d3_of_a_living_process_that_is_hidden_nobody_can_tell_who_it_is(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        boot, namespace, _, started = reaping.owner().split(":")
        hidden = reaping.owner()
        gone = [f"{boot}:{namespace}:{pid}:{started}" for pid in (a_dead_process(), 10**30)]
        assert reaping.is_dead(hidden) is False
        monkeypatch.setattr(reaping, "PROC", tmp_path)  # as with hidepid, and another's process
        assert reaping.is_dead(hidden) is None
        assert not reaping.is_orphan({reaping.OWNER_LABEL: hidden}, time.time())
        assert [reaping.is_dead(name) for name in gone] == [True, True]

    def test_of_our_own_only_what_no_living_sandbox_has_is_an_orphan(self) -> None:
        labels = {reaping.OWNER_LABEL: reaping.owner(), reaping.SANDBOX_LABEL: "t"}
        with reaping.alive("t"):
            assert not reaping.is_orphan(labels, time.time())
        assert reaping.is_orphan(labels, time.time())

    def test_where_nobody_can_tell_only_what_is_long_past_its_deadline_is_an_orphan(self) -> None:
        labels = {reaping.OWNER_LABEL: "elsewhere", reaping.DEADLINE_LABEL: "1000"}
        assert not reaping.is_orphan(labels, 1000 + reaping.LONG_PAST_SECONDS)
        assert reaping.is_orphan(labels, 1001 + reaping.LONG_PAST_SECONDS)
        assert not reaping.is_orphan({reaping.OWNER_LABEL: "elsewhere"}, 1e12)
        assert not reaping.is_orphan({}, 1e12)

    def test_d3_folders_of_the_dead_are_removed_and_those_of_the_living_are_not(self) -> None:
        boot, namespace, _, started = reaping.owner().split(":")
        dead, living, nobodys = WorkRoot(), WorkRoot(), WorkRoot()
        try:
            gone = f"{boot}:{namespace}:{a_dead_process()}:{started}"
            (dead.path / reaping.OWNER_FILE).write_text(gone)
            (living.path / reaping.OWNER_FILE).write_text(reaping.owner())
            reaping._remove_folders()
            assert not dead.path.exists()
            assert living.path.exists()
            assert nobodys.path.exists()
        finally:
            for root in (dead, living, nobodys):
                root.remove()


class TestTheKernelsBooks:
    @pytest.mark.parametrize(
        ("oom_kills", "reached", "files"),
        [
            (0, False, {"memory.oom_control": "under_oom 0\noom_kill 0\n", "memory.failcnt": "0"}),
            (2, True, {"memory.oom_control": "under_oom 0\noom_kill 2\n", "memory.failcnt": "9\n"}),
            (
                1,
                True,  # by the limit of memory and swap together
                {
                    "memory.oom_control": "under_oom 0\noom_kill 1\n",
                    "memory.failcnt": "0\n",
                    "memory.memsw.failcnt": "9\n",
                },
            ),
            (1, False, {"memory.events": "low 0\nmax 9\noom 0\noom_kill 1\n"}),  # for others
            (1, True, {"memory.events": "low 0\nmax 9\noom 1\noom_kill 1\n"}),
            (0, False, {}),  # closed
        ],
    )
    def test_a4_they_tell_who_was_killed_and_whether_for_its_own_limit(
        self, tmp_path: Path, oom_kills: int, reached: bool, files: dict[str, str]
    ) -> None:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        books = Books(tmp_path, tmp_path)
        assert (books.oom_kills(), books.reached_limit()) == (oom_kills, reached)
        assert books.tells_why == ("memory.events" in files)

    def test_cpu_time_is_told_by_either_version_and_ends_with_the_container(
        self, tmp_path: Path
    ) -> None:
        books = Books(tmp_path, tmp_path)
        assert (books.cpu_seconds(), books.open) == (0.0, False)
        (tmp_path / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
        assert books.cpu_seconds() == 1.5
        (tmp_path / "cpuacct.usage").write_text("2500000000\n")
        (tmp_path / "cgroup.procs").write_text("7\n12\n")
        assert (books.cpu_seconds(), books.pids()) == (2.5, [7, 12])


class TestGpus:
    @pytest.fixture
    def program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        monkeypatch.setenv("PATH", str(tmp_path))

        def write(script: str) -> None:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)

        return write

    def test_a16_who_computes_on_one_is_told(self, program: Callable[[str], None]) -> None:
        assert docker._gpu_users("0") == []  # there is nobody to ask
        program("echo 12; echo 345")
        assert docker._gpu_users("0") == ["12", "345"]

    def test_a16_where_nobody_says_who_computes_it_does_not_pass_for_idle(
        self, program: Callable[[str], None]
    ) -> None:
        program("exit 9")
        with pytest.raises(InfrastructureFailure, match=r"who uses GPU 0: .* 9"):
            docker._gpu_users("0")


class OneContainer(engine.Engine):
    """An engine with one container, which it removes in its own time."""

    def __init__(self, running: bool = False, refusal: int | None = None) -> None:
        super().__init__(None, "")
        self.killed = self.removed = False
        self.may_remove = threading.Event()
        self._running, self._refusal = running, refusal

    def kill(self, name: str) -> None:
        self.killed = True
        if self._refusal is not None:
            raise EngineFailure("it cannot be killed", self._refusal)

    def state(self, name: str, seconds: float = 0.0) -> State | None:
        return State(self._running, False, 0, 0, False)

    def purge(self, name: str, seconds: float) -> None:
        if not self.may_remove.wait(seconds):
            raise EngineFailure(f"{name} is still there")
        self.removed = True


class TestRemovals:
    @pytest.mark.parametrize("refusal", [None, 404, 409])
    def test_what_has_ended_is_removed_later_and_waited_for(self, refusal: int | None) -> None:
        found = OneContainer(refusal=refusal)
        removals = Removals(found)
        removals.remove("c", PATIENCE)
        assert (found.killed, found.removed) == (True, False)
        waiting = threading.Thread(target=removals.finish)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        found.may_remove.set()
        waiting.join(PATIENCE)
        assert not waiting.is_alive()
        assert found.removed

    @pytest.mark.parametrize(("running", "refusal"), [(True, None), (False, 500)])
    def test_a7_what_may_still_run_is_removed_at_once(
        self, running: bool, refusal: int | None
    ) -> None:
        found = OneContainer(running, refusal)
        removals = Removals(found)
        with pytest.raises(EngineFailure, match="still there"):
            removals.remove("c", 0.1)
        found.may_remove.set()
        removals.remove("c", PATIENCE)
        assert found.removed
        removals.finish()

    def test_a_removal_that_failed_is_told_of_once(self) -> None:
        removals = Removals(OneContainer())
        removals.remove("c", 0.1)
        with pytest.raises(EngineFailure, match="still there"):
            removals.finish()
        removals.finish()

    def test_where_no_thread_can_be_started_nothing_is_put_off(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        found = OneContainer()
        found.may_remove.set()
        removals = Removals(found)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        removals.remove("c", PATIENCE)
        assert found.removed
        removals.finish()


class MuteEngine:
    """An engine that says which version it is, and nothing else."""

    def __init__(self, place: Path) -> None:
        self._visitors: list[socket.socket] = []
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(place))
        self._door.listen()
        self._thread = threading.Thread(target=self._admit)
        self._thread.start()

    def _admit(self) -> None:
        body = b'{"ApiVersion": "1.41"}'
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        while True:
            try:
                visitor, _ = self._door.accept()
            except OSError:
                return
            self._visitors.append(visitor)
            if b"/version" in visitor.recv(1 << 16):
                visitor.sendall(head + body)

    def close(self) -> None:
        self._door.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        for end in (self._door, *self._visitors):
            end.close()


class TestAnEngineThatHangs:
    @pytest.mark.parametrize(
        "ask",
        [
            lambda found: found.purge("name", 0.5),
            lambda found: Removals(found).remove("name", 0.5),
            lambda found: found.pause("name"),
            lambda found: found.kill("name"),
            lambda found: found.state("name", 0.5),
        ],
        ids=["purge", "remove", "pause", "kill", "state"],
    )
    def test_e3_it_does_not_keep_who_stops_a_container_waiting(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        ask: Callable[[engine.Engine], object],
    ) -> None:
        mute = MuteEngine(tmp_path / "mute.sock")
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/mute.sock")
        monkeypatch.setattr(engine, "STOP_SECONDS", 0.5)
        try:
            with contextlib.closing(engine.connect()) as found:
                began = time.monotonic()
                with pytest.raises(EngineFailure):
                    ask(found)
                assert time.monotonic() - began < engine_calls.CALL_SECONDS / 2
        finally:
            mute.close()


class TestConnecting:
    def test_e1_without_an_engine_it_says_how_to_get_one(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
        with pytest.raises(EngineUnavailable, match=r"none\.sock.*apt-get install docker\.io"):
            engine.connect()

    def test_e1_a_socket_on_which_nobody_listens_is_told_of(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.bind(str(tmp_path / "deaf.sock"))
            monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/deaf.sock")
            with pytest.raises(EngineUnavailable, match="refused"):
                engine.connect()

    def test_e1_an_engine_of_another_machine_is_not_used(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
        with pytest.raises(EngineUnavailable, match="this machine"):
            engine.connect()

    def test_e1_without_permission_it_says_which_group_to_join(self) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            socket.socket(socket.AF_UNIX) as door,
        ):
            place = Path(folder, "private.sock")
            Path(folder).chmod(0o755)
            door.bind(str(place))
            door.listen()
            place.chmod(0)
            visitor = os.fork()
            if visitor == 0:
                try:
                    if os.geteuid() == 0:
                        become(64_123)
                    engine_calls.knock(str(place))
                    os._exit(2)
                except EngineUnavailable as obstacle:
                    os._exit(0 if "usermod -aG docker" in str(obstacle) else 3)
                finally:
                    os._exit(4)
            assert os.waitstatus_to_exitcode(os.waitpid(visitor, 0)[1]) == 0
