"""Where a sandbox cannot work, it says so in one line that names the cure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from darwin_exp.protocols import SandboxUnavailable
from darwin_exp.sandbox import bubblewrap
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
    program = """
from darwin_exp.individual import Genome
from darwin_exp.protocols import Launch, Limits, SandboxUnavailable, Zone
from darwin_exp.sandbox.process import ProcessSandbox
try:
    sandbox = ProcessSandbox(0, (0,), 64_000, modules=())
except SandboxUnavailable as obstacle:
    print("unavailable", obstacle)
else:
    genome = Genome.of({"train.py": "import os; print(os.getuid() >= 64_000)", "model.py": ""})
    group = sandbox.start(Launch("x", Zone.TRAIN, genome, {}, {}, Limits()))
    group.wait(20)
    print(sandbox.isolated, group.log()[0].strip())
    sandbox.close()
"""
    without = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    done = subprocess.run(
        [*without, sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    if all(can_enter(folder, 64_000) for folder in interpreter_folders()):
        assert done.stdout == "False True\n"
    else:
        assert done.stdout.startswith("unavailable")
        assert "CAP_SYS_ADMIN" in done.stdout
