"""A1 to A20: what a candidate does to the machine it runs on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from darwin_exp.config import PROJECT
from darwin_exp.individual import Reason, SandboxSpec, Status
from darwin_exp.protocols import InfrastructureFailure, SandboxUnavailable
from darwin_exp.sandbox import bubblewrap
from tests.attacks import models
from tests.attacks.boxes import CANARY, CLEAN_UP_SECONDS, OK, Box, Found, build
from tests.attacks.outside import free_bytes, n_processes, named, resident_bytes

OUT_OF_MEMORY = (Status.OUT_OF_MEMORY, Reason.MEMORY)
TIMED_OUT = (Status.TIMED_OUT, Reason.NO_CHECKPOINT)
FOR_A_SECOND: dict[str, Any] = {"budget_seconds": 1.0, "max_steps": None}
SLACK_BYTES = 64 << 20  # what other tests may write meanwhile
GHOST = f"ghost-{os.getpid()}"[:15]  # as long as a process's name may be


def assert_in_time(found: Found) -> None:
    late = found.seconds - found.training.startup_seconds - FOR_A_SECOND["budget_seconds"]
    assert late < CLEAN_UP_SECONDS


class Disk:
    """Remembers how much the disk had filled when it was looked at."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._before = folder, free_bytes(folder)
        self.fell_bytes = 0

    def look(self) -> None:
        self.fell_bytes = self._before - free_bytes(self._folder)


# --- network, processes, memory, time -------------------------------------------------------------

REACH = """
import json, socket

def devices():
    return [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line]

def reached():
    found = []
    for address in (("127.0.0.1", PORT), ("192.0.2.1", 80), ("169.254.169.254", 80)):
        try:
            socket.create_connection(address, timeout=2).close()
            found.append(address)
        except OSError:
            pass
    try:
        found.append(socket.getaddrinfo("example.com", 80)[0][4])
    except OSError:
        pass
    return found
"""


def test_a1_nothing_is_reached_from_inside_and_the_run_goes_on(box: Box) -> None:
    modes: list[str] = []

    def look() -> None:
        if box.engine is not None:
            modes.extend(one["HostConfig"]["NetworkMode"] for one in box.engine.inspected())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        socket.create_connection(address).close()  # from out here, it answers
        listener.accept()[0].close()
        listener.settimeout(0.1)
        reach = REACH.replace("PORT", str(address[1]))
        found = box.attack(
            OK,
            f"{reach}\nprint(json.dumps([devices(), reached()]))",
            model=f"{models.HONEST}\n{reach}\nassert not reached()\n",
            look=look,
        )
        with pytest.raises(TimeoutError):
            listener.accept()
    assert found.printed == [["lo"], []]
    assert found.metrics == box.honest
    assert modes == (["none"] if box.engine else [])


FORKS = """
n = 0
try:
    while n < 400:
        if os.fork() == 0:
            time.sleep(600)
        n += 1
except OSError:
    pass
print(n, flush=True)
time.sleep(600)
"""


def test_a2_a_fork_bomb_is_bounded_and_the_machine_stays_as_it_was(box: Box) -> None:
    before, seen = n_processes(), list[int]()
    found = box.attack(
        OK,
        FORKS,
        training={**FOR_A_SECOND, "max_processes": 48},
        look=lambda: seen.append(n_processes()),
    )
    assert 0 < found.printed < 60
    assert seen[0] - before < 200
    assert_in_time(found)


HOARD = """
hoard = []
while True:
    hoard.append(bytearray(b"x") * 10_000_000)
    time.sleep(0.02)
"""


def test_a3_who_eats_its_memory_is_out_of_memory(box: Box) -> None:
    box.attack(OUT_OF_MEMORY, HOARD, training={"memory_mb": 128})


CHILD_HOARDS = f"""
if os.fork() == 0:
    exec({HOARD!r})
os.wait()
print(json.dumps({{"val_perplexity": 1.0}}))
"""


def test_a4_a_child_out_of_memory_counts_before_its_parents_exit_status(box: Box) -> None:
    box.attack(OUT_OF_MEMORY, CHILD_HOARDS, training={"memory_mb": 128})


def test_a5_an_endless_loop_ends_at_its_budget(box: Box) -> None:
    found = box.attack(TIMED_OUT, train="while True: pass\n", training=FOR_A_SECOND)
    assert found.training.training_seconds >= 1.0
    assert_in_time(found)


DEAF = """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    time.sleep(1)
"""


def test_a6_who_ignores_every_signal_is_killed(box: Box) -> None:
    assert_in_time(box.attack(TIMED_OUT, train=DEAF, training=FOR_A_SECOND))


DAEMON = """
import ctypes
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(15, b"NAME", 0, 0, 0)
        Path("out/ghost").touch()
        while True:
            time.sleep(0.01)
    os._exit(0)
os.wait()
while not Path("out/ghost").exists():
    time.sleep(0.01)
"""


def test_a7_a_daemon_does_not_outlive_its_run(box: Box) -> None:
    seen: list[list[int]] = []
    held: list[list[str]] = []

    def look() -> None:
        seen.append(named(GHOST))
        held.append(box.traces())

    found = box.attack(OK, DAEMON.replace("NAME", GHOST), look=look)
    assert named(GHOST) == []
    assert found.training.exit_code == 0
    # That nothing is listed afterwards means something: it was, while it ran. In bubblewrap its
    # process 1 takes everybody along when training ends, and whoever looks then may be too late.
    if box.kind != "bubblewrap":
        assert len(seen[0]) == 1, "who looks from outside would not see it"
        expected = {"folder", "container", "volume"} if box.engine else {"folder", "process"}
        assert {trace.split()[0] for trace in held[0]} == expected


ATTACHES = """
import atexit, ctypes, os, signal, time
libc = ctypes.CDLL(None)
for pid in (1, os.getppid()):
    libc.ptrace(16, pid, 0, 0)
    try:
        os.kill(pid, signal.SIGSTOP)
    except OSError:
        pass
atexit.register(time.sleep, 600)
"""


def test_a8_stopping_whoever_is_above_and_hanging_at_the_end_wins_no_time(box: Box) -> None:
    assert_in_time(box.attack(TIMED_OUT, train=ATTACHES, training=FOR_A_SECOND))


# --- disk and log ---------------------------------------------------------------------------------

ONE_FILE = """
written = 0
try:
    with open("out/big", "wb", buffering=0) as file:
        while written < 400_000_000:
            written += file.write(b"x" * 1_000_000)
except OSError as error:
    print(error.strerror)
print(written, flush=True)
"""


def test_a9_a_file_that_grows_without_end_fills_no_disk(box: Box) -> None:
    before, taken = box.bytes_on_disk(), list[int]()
    found = box.attack(
        OK, ONE_FILE, training={"file_mb": 8}, look=lambda: taken.append(box.bytes_on_disk())
    )
    assert found.metrics == box.honest
    assert 0 < found.printed <= 8 << 20
    assert taken[0] - before < 9 << 20


def test_a10_a_hundred_thousand_files_do_not_all_come_to_be(box: Box) -> None:
    before = os.statvfs(box.disk).f_ffree
    left: list[int] = []
    files = """
    n = 0
    try:
        while n < 100_000:
            open(f"out/{n}", "wb").close()
            n += 1
    except OSError as error:
        print(error.strerror)
    print(n)
    """
    found = box.attack(OK, files, look=lambda: left.append(os.statvfs(box.disk).f_ffree))
    assert "No space left on device" in found.log
    assert found.printed < 100_000
    assert before - left[0] < 20_000


def test_a11_many_small_files_together_are_bounded_as_one_would_be(box: Box) -> None:
    disk = Disk(box.disk)
    files = """
    written = 0
    try:
        for n in range(64):
            with open(f"out/{n}", "wb", buffering=0) as file:
                for _ in range(4):
                    written += file.write(b"x" * 1_000_000)
    except OSError as error:
        print(error.strerror)
    print(written)
    """
    found = box.attack(OK, files, training={"file_mb": 16}, look=disk.look)
    assert "No space left on device" in found.log
    assert 0 < found.printed <= 16 << 20
    assert disk.fell_bytes < (16 << 20) + SLACK_BYTES


def test_a12_a_flood_of_output_costs_neither_memory_nor_disk(box: Box) -> None:
    before, most = (box.bytes_on_disk(), resident_bytes()), list[tuple[int, int]]()
    kept: list[tuple[str, str]] = []  # by the engine: by which driver, and where

    def look() -> None:
        most.append((box.bytes_on_disk(), resident_bytes()))
        if box.engine is not None:
            kept.extend(
                (one["HostConfig"]["LogConfig"]["Type"], one["LogPath"])
                for one in box.engine.inspected()
            )

    flood = """
    chunk = b"y" * 1_000_000
    for _ in range(120):  # one line, and it never ends
        os.write(1, chunk)
    time.sleep(600)
    """
    found = box.attack(OK, flood, training={"budget_seconds": 1.5, "max_steps": None}, look=look)
    assert found.training.log_truncated
    assert (found.folder / "train.log").stat().st_size <= 1_000_000
    assert most[0][0] - before[0] < 1 << 20  # while it lasts, the log is kept in memory
    assert most[0][1] - before[1] < SLACK_BYTES
    assert box.bytes_on_disk() - before[0] < 4 << 20  # and then, its end stays
    assert kept == ([("none", "")] if box.engine else [])


# --- what is to be seen and touched ---------------------------------------------------------------


def test_a13_nothing_can_be_written_but_out_and_temp(box: Box) -> None:
    write = f"""
    def works(path):
        try:
            open(path, "a").close()
        except OSError:
            return False
        return True

    for folder in ("code", "in", "."):
        try:
            os.chmod(folder, 0o777)
        except OSError:
            pass
    places = ["job.json", "code/train.py", "code/new", "in/train.bin", "in/new", "new"]
    places += ["/new", "/usr/new", "/etc/new", "/etc/passwd", "/var/new", "/home/new", "/root/new"]
    places += ["/programs/launcher.py", "/programs/new", "/proc/sys/kernel/hostname"]
    places += ["/proc/sysrq-trigger", "/sys/kernel/new", {str(box.data.folder / "new")!r}]
    inside = ["out/new", os.environ["TMPDIR"] + "/new"]
    print(json.dumps([[p for p in places if works(p)], [p for p in inside if not works(p)]]))
    """
    text = box.data.folder / "train.bin"
    before = hashlib.sha256(text.read_bytes()).hexdigest()
    found = box.attack(OK, write)
    assert found.printed == [[], []]
    assert hashlib.sha256(text.read_bytes()).hexdigest() == before
    assert not (box.data.folder / "new").exists()


def test_a14_nobody_becomes_root_or_makes_a_namespace(box: Box) -> None:
    if box.kind == "bubblewrap" and not bubblewrap._no_nesting(str(shutil.which("bwrap"))):
        pytest.skip("this bwrap cannot forbid user namespaces (it takes 0.8 or newer)")
    climb = """
    import ctypes
    libc = ctypes.CDLL(None)
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))

    def root():
        try:
            os.setuid(0)
        except OSError:
            return False
        return True

    print(json.dumps({
        "root": root(),
        "user namespace": libc.unshare(0x10000000) == 0,
        "mount namespace": libc.unshare(0x20000) == 0,
        "mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0,
        "capabilities": int(status["CapEff"], 16) != 0,
        "more privileges by a program": status["NoNewPrivs"].strip() != "1",
        "bounding": int(status["CapBnd"], 16) != 0,
    }))
    """
    won = {what for what, done in box.attack(OK, climb).printed.items() if done}
    # Bubblewrap's bounding set is one of a namespace that owns nothing.
    assert won <= ({"bounding"} if box.kind == "bubblewrap" else set())


def test_a15_no_secret_of_the_harness_is_to_be_found(box: Box, secret_file: Path) -> None:
    inspected: list[str] = []
    spy = f"""
    import glob, socket

    def read(path):
        try:
            return open(path, "rb").read().decode("utf-8", "replace")
        except OSError:
            return ""

    seen = [str(dict(os.environ))]
    seen += map(read, glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"))
    seen += map(read, ["/proc/self/mountinfo", {str(secret_file)!r}])
    reached = []
    for path in ("/var/run/docker.sock", "/run/docker.sock", "/run/containerd/containerd.sock"):
        with socket.socket(socket.AF_UNIX) as end:
            try:
                end.connect(path)
                reached.append(path)
            except OSError:
                pass
    save(table, {{"seen": seen}})
    (out / "progress.jsonl").write_text("\\n".join(seen))
    print(*seen, sep="\\n")
    print(json.dumps(reached))
    """

    def look() -> None:
        if box.engine is not None:
            inspected.append(json.dumps(box.engine.inspected()))

    found = box.attack(OK, spy, look=look)
    assert found.printed == []
    assert "PATH" in found.log
    left = [path for path in found.folder.rglob("*") if path.is_file()]
    assert {"train.log", "evaluation.json", "model.json"} <= {path.name for path in left}
    for path in left:
        assert CANARY.encode() not in path.read_bytes(), path.name
    for text in inspected:
        assert "darwin.run" in text
        assert CANARY not in text
    if box.kind != "process":  # whose candidates know the machine's mounts
        assert str(box.data.folder) not in found.log


def test_a16_one_gpu_is_to_be_seen_and_it_is_left_idle(box: Box) -> None:
    program = shutil.which("nvidia-smi") or ""
    if not program:
        pytest.skip("it takes an NVIDIA GPU")
    assert box.engine is not None
    if "nvidia" not in box.engine.runtimes():
        pytest.skip("it takes an engine with NVIDIA's container toolkit")

    def asked(what: str) -> list[str]:
        command = [program, f"--query-{what}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    gpu, at_work = asked("gpu=uuid")[0], asked("compute-apps=pid")
    sandbox = build("docker", box.image, gpus=(gpu,))
    own = Box("docker", sandbox, box.data, box.folder / "gpu", engine=box.engine, image=box.image)
    try:
        look = """
        import re
        print(json.dumps([n for n in os.listdir("/dev") if re.fullmatch(r"nvidia[0-9]+", n)]))
        """
        found = own.attack(OK, look, goes_on=False, training={"device": "cuda"})
        assert len(found.printed) == 1
        assert asked("compute-apps=pid") == at_work
    finally:
        sandbox.close()
    box.assert_the_loop_goes_on()


def test_a17_files_in_memory_count_as_memory(box: Box) -> None:
    fill = """
    for folder in ("/dev/shm", "/tmp", os.environ["TMPDIR"], "out"):
        try:
            with open(folder + "/big", "wb", buffering=0) as file:
                for _ in range(200):
                    file.write(b"x" * 1_000_000)
        except OSError as error:
            print(folder, error.strerror, flush=True)
    """
    box.attack(OUT_OF_MEMORY, fill, training={"memory_mb": 96, "file_mb": 512})


# --- engines that cannot do as they are told ------------------------------------------------------


def test_a18_an_absent_runtime_is_an_error_and_nothing_weaker_is_taken(
    box: Box, tmp_path: Path
) -> None:
    assert box.engine is not None
    if "runsc" in box.engine.runtimes():
        pytest.skip("gVisor is installed here")
    folders = [f"paths.{name}={tmp_path / name}" for name in ("runs", "memory", "data")]
    command = [sys.executable, "-m", "darwin_exp", "+debug=tiny", "sandbox=docker", *folders]
    command += ["sandbox.runtime=runsc", f"sandbox.image={box.image}"]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=PROJECT, check=False, timeout=120
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("darwin: ")]
    assert "runsc" in line
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.rglob("journal.sqlite")) == []
    box.assert_nothing_is_left()
    box.assert_the_loop_goes_on()


def test_a19_an_absent_image_is_an_error_and_is_not_pulled(box: Box) -> None:
    from darwin_exp.sandbox.docker import DockerSandbox

    assert box.engine is not None
    before = box.engine.images()
    for absent in ("sha256:" + "0" * 64, "darwin-trainer:absent"):
        with pytest.raises(SandboxUnavailable, match="make image"):
            DockerSandbox.check(SandboxSpec("docker", image=absent))
        with pytest.raises(SandboxUnavailable):
            build("docker", absent)
    assert box.engine.images() == before
    box.assert_nothing_is_left()
    box.assert_the_loop_goes_on()


def test_a20_a_container_that_was_created_and_cannot_start_is_removed(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else the missing GPU would be noticed before anything of a candidate is created.
    monkeypatch.setattr("darwin_exp.sandbox.docker.examine", lambda *_: None)
    assert box.engine is not None
    since = time.time()
    sandbox = build("docker", box.image, gpus=("GPU-that-is-not-there",))
    folder = box.folder / "no-gpu"
    unlucky = Box("docker", sandbox, box.data, folder, engine=box.engine, image=box.image)
    try:
        with pytest.raises(InfrastructureFailure):
            unlucky.run(training={"device": "cuda"})
        unlucky.assert_nothing_is_left()
    finally:
        sandbox.close()
    assert box.engine.n_created(since) == 1
    box.assert_the_loop_goes_on()
