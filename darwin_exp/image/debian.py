"""A base image from Debian's packages, for where no image registry can be reached.

Reads: Debian's archive, by the mirror that this machine's apt is set up with.
Writes: a file tree in a temporary folder, removed again.
Source: the manual page of debootstrap.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from darwin_exp.image.recipe import ImageError
from darwin_exp.image.store import Announce, Image, Store, one_line, packed

SUITE = "bookworm"
NAME = "debootstrap"  # what a base made here is called where a base is chosen
_PACKAGES = ("python3", "ca-certificates")
_COMPILER_PACKAGES = ("python3-dev", "g++")
# Caches, logs, and what debootstrap copies from this machine and candidates need not read.
_LEFT_OUT = (
    "./dev/*",
    "./proc/*",
    "./sys/*",
    "./tmp/*",
    "./var/cache/*",
    "./var/lib/apt/lists/*",
    "./var/log/*",
    "./etc/apt/sources.list",
    "./etc/hostname",
    "./etc/machine-id",
    "./etc/resolv.conf",
)
_ADMIN_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"


def tag(compiler: bool) -> str:
    """Return the name of the image that `make` makes."""
    recipe = "\n".join((SUITE, *_wanted(compiler), *_LEFT_OUT, os.uname().machine))
    return f"darwin-debian:{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"


def obstacle() -> str | None:
    """Return what this machine lacks to make one; None where it lacks nothing."""
    if shutil.which("debootstrap", path=_path()) is None:
        return "the program debootstrap (apt-get install debootstrap)"
    if os.geteuid() != 0:
        return "root"
    return None


def make(store: Store, compiler: bool, announce: Announce) -> Image:
    """Make the base image and give it its tag.

    Raises:
        ImageError: debootstrap failed.
    """
    announce(f"debootstrap: Debian {SUITE}, which takes a minute or two")
    with _tree(_wanted(compiler), announce) as tree:
        excluded = [f"--exclude={pattern}" for pattern in _LEFT_OUT]
        announce("debootstrap: importing the tree")
        return store.take_in(packed(tree, "--one-file-system", *excluded), tag(compiler))


def mirror(etc: Path = Path("/etc")) -> str | None:
    """Return the Debian mirror of this machine's apt; None where it has none of this suite."""
    sources = list(_one_line_sources(etc)) + list(_stanza_sources(etc))
    fitting = [
        uri
        for uri, suites, components in sources
        if SUITE in suites and "main" in components and uri.startswith(("http:", "https:", "file:"))
    ]
    # Other archives name their suites after Debian's; Debian's own ends so on every mirror.
    own = [uri for uri in fitting if uri.rstrip("/").endswith("/debian")]
    return next(iter(own or fitting), None)


def scratch_folder() -> str:
    """Return where gigabytes may lie for a while, which /tmp in memory is not."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if Path("/var/tmp").is_dir() else "/tmp")


def _wanted(compiler: bool) -> tuple[str, ...]:
    return _PACKAGES + _COMPILER_PACKAGES if compiler else _PACKAGES


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:{_ADMIN_FOLDERS}"


@contextmanager
def _tree(packages: Sequence[str], announce: Announce) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="darwin-debian-", dir=scratch_folder()))
    try:
        tree = place / "tree"
        _bootstrap(packages, tree, announce)
        tree.chmod(0o755)  # it becomes the root folder, which every user must enter
        yield tree
    finally:
        _remove(place)


def _bootstrap(packages: Sequence[str], tree: Path, announce: Announce) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", SUITE]
    command.append(str(tree))
    if (source := mirror()) is not None:
        command.append(source)
    told: set[str] = set()
    problem = "it gave no reason"
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        umask=0o022,
        env={**os.environ, "PATH": _path(), "LC_ALL": "C"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            kind, _, text = line.strip().partition(": ")
            if kind == "I":
                stage = text.partition(" ")[0].lower()
                if stage not in told:  # one line for each kind of work, not for each package
                    told.add(stage)
                    announce(f"debootstrap: {stage}")
            elif kind in ("E", "W") and text:
                problem = text
    if process.returncode != 0:
        raise ImageError(
            f"debootstrap failed: {one_line(problem)}; mend that, or name a base image that can "
            "be had with BASE_IMAGE"
        )


def _remove(place: Path) -> None:
    """Remove a tree, and first what a debootstrap that was interrupted left mounted in it."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((one for one in mounts if one.startswith(f"{place}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)
    subprocess.run(["rm", "-rf", "--one-file-system", str(place)], check=False)


_Source = tuple[str, list[str], list[str]]  # URI, suites, components


def _one_line_sources(etc: Path) -> Iterator[_Source]:
    """Yield `deb [options] URI SUITE COMPONENT...` lines."""
    for path in (etc / "apt/sources.list", *sorted((etc / "apt/sources.list.d").glob("*.list"))):
        for line in _lines(path):
            parts = re.match(r"deb\s+(?:\[[^\]]*\]\s*)?(\S+)\s+(\S+)\s*(.*)", line)
            if parts is not None:
                yield parts[1], [parts[2]], parts[3].split()


def _stanza_sources(etc: Path) -> Iterator[_Source]:
    """Yield what stands in files of `Field: value` stanzas."""
    for path in sorted((etc / "apt/sources.list.d").glob("*.sources")):
        text = "\n".join(line for line in _lines(path) if not line.startswith("#"))
        for stanza in re.split(r"\n\s*\n", text):
            fields = {
                name.lower(): value.split()
                for name, value in re.findall(r"^([\w-]+):(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
            }
            if "deb" in fields.get("types", []) and fields.get("enabled") != ["no"]:
                for uri in fields.get("uris", []):
                    yield uri, fields.get("suites", []), fields.get("components", [])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
