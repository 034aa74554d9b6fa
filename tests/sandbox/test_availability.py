"""Where a sandbox cannot work, it says so in one line that names the cure."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from darwin_exp.protocols import SandboxUnavailable
from darwin_exp.sandbox import bubblewrap, confinement
from darwin_exp.sandbox.bubblewrap import BubblewrapSandbox
from darwin_exp.sandbox.confinement import can_enter, interpreter_folders
from darwin_exp.sandbox.process import ProcessSandbox
from darwin_exp.sandbox.supervised import PACKAGE_ROOT


def test_without_bwrap_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap"):
        BubblewrapSandbox.check()


def test_a_bwrap_that_is_refused_namespaces_is_told_of_with_what_to_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = ["-c", "echo No permissions to create new namespace >&2; exit 1"]
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/sh")
    monkeypatch.setattr(bubblewrap, "_namespaces", lambda: refused)
    with pytest.raises(SandboxUnavailable, match=r"No permissions.*max_user_namespaces"):
        BubblewrapSandbox.check()


def test_elsewhere_than_on_linux_it_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxUnavailable, match="docker"):
        ProcessSandbox.check()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
def test_root_without_namespaces_either_works_unisolated_or_says_what_it_cannot_read() -> None:
    left = Path(f"/var/tmp/left-by-a-homeless-candidate-{os.getpid()}")
    program = (
        f"LEFT = {str(left)!r}"
        """
from darwin_exp.individual import Genome
from darwin_exp.protocols import Launch, Limits, SandboxUnavailable, Zone
from darwin_exp.sandbox.process import ProcessSandbox
try:
    sandbox = ProcessSandbox(0, (0,), 64_000, modules=())
except SandboxUnavailable as obstacle:
    print("unavailable", obstacle)
else:
    train = "import os; open(LEFT, 'w').close(); print(os.getuid() >= 64_000)"
    genome = Genome.of({"train.py": train.replace("LEFT", repr(LEFT)), "model.py": ""})
    group = sandbox.start(Launch("x", Zone.TRAIN, genome, {}, {}, Limits()))
    group.wait(20)
    print(sandbox.isolated, group.log()[0].strip())
    sandbox.close()
"""
    )
    without = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    done = subprocess.run(
        [*without, sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not left.exists()
    if all(can_enter(folder, 64_000) for folder in interpreter_folders()):
        assert done.stdout == "False True\n"
    else:
        assert done.stdout.startswith("unavailable")
        assert "CAP_SYS_ADMIN" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root builds houses")
def test_a_house_that_cannot_be_finished_is_no_house_to_go_on_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(target: str) -> None:
        raise PermissionError(errno.EPERM, f"mount_setattr {target}")

    builder = os.fork()
    if builder == 0:
        try:
            if not confinement.build_house([], [], 64_000):
                os._exit(3)
            monkeypatch.setattr(confinement, "_set_read_only", refuse)
            confinement.build_house([], [tmp_path], 64_000)
            os._exit(2)
        except SandboxUnavailable as obstacle:
            os._exit(0 if str(tmp_path) in str(obstacle) else 4)
        finally:
            os._exit(5)
    outcome = os.waitstatus_to_exitcode(os.waitpid(builder, 0)[1])
    if outcome == 3:
        pytest.skip("this kernel does not let us build one at all")
    assert outcome == 0
