"""What holds a candidate in a container, in the words of the engine's HTTP interface.

Nothing of the host is in it but its working folder and the harness's own programs, both to be
read only. All that it can write lies in memory of bounded size, and counts as its own.

Reads: the options of a sandbox, the limits of a launch.
Writes: nothing.
Never: lets an environment variable of the harness in, or leaves a limit to the engine's default.

Source: the engine's API reference. That each of these holds as seen from inside is measured on
engine 20.10 by tests/sandbox/test_docker.py; of newer engines, gVisor and GPUs it is inferred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darwin_exp.protocols import Limits, Zone

UID = 65_532  # nobody's, in any image
PROGRAMS, INSIDE, OUT, SCRATCH = "/programs", "/job", "/job/out", "/scratch"
MAX_OPEN_FILES = 4096
MAX_INODES = 65_536  # per place that can be written to
SCRATCH_MB, TMP_MB, SHARED_MEMORY_MB = 1024, 64, 256
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Housing:
    """What a container is made of, whatever runs in it.

    Attributes:
        image: id of its image.
        runtime: what the engine runs it with; None for its default.
        gpu: the one device that it sees; None for none.
        cpus: the CPUs that it may use.
        programs: host folder of the harness's own programs.
        labels: by which it will be known.
    """

    image: str
    runtime: str | None
    gpu: str | None
    cpus: tuple[int, ...]
    programs: Path
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """What a container is to be.

    Attributes:
        config: what the engine shall create.
        volume: options and labels of the volume that takes what is left; None for none.
        token: what the keeper puts before the end of what is printed.
    """

    zone: Zone
    config: Mapping[str, Any]
    volume: tuple[Mapping[str, str], Mapping[str, str]] | None
    token: str
    cpus: tuple[int, ...]
    log_bytes: int


def container_config(
    housing: Housing,
    command: Sequence[str],
    limits: Limits,
    folder: Path | None = None,
    volume: str | None = None,
) -> dict[str, Any]:
    """Return what the engine is to create.

    Args:
        command: what its interpreter is given; also arguments of the interpreter itself.
        folder: host folder of one launch; None for none.
        volume: name of the volume that takes what the candidate leaves.
    """
    return {
        "Image": housing.image,
        "Entrypoint": ["python3"],
        "Cmd": list(command),
        "WorkingDir": INSIDE if folder is not None else "/",
        "User": f"{UID}:{UID}",
        "Hostname": "candidate",
        "Env": _environment(limits, housing.gpu),
        "Labels": dict(housing.labels),
        "Tty": False,
        # Its standard input ends when the harness does; see keeper.py.
        "OpenStdin": True,
        "StdinOnce": True,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "Healthcheck": {"Test": ["NONE"]},
        # Its network holds nothing but itself either way. Without this, the engine starts a copy
        # of its own program for every container, to enter that nothing in its books.
        "NetworkDisabled": True,
        "HostConfig": _host_config(housing, limits, folder, volume),
    }


def volume_options(limits: Limits) -> dict[str, str]:
    """Return the options of the volume that takes what a candidate leaves.

    It lies in memory: no candidate can fill a disk, and what it holds counts against the memory
    limit of the container. It exists as long as a container that uses it runs, frozen or not. All
    may write to it: no other container has it, and inside, the engine may count users differently.
    """
    size = f"size={limits.file_mb}m,nr_inodes={MAX_INODES}"
    return {
        "type": "tmpfs",
        "device": "tmpfs",
        "o": f"nosuid,nodev,{size},uid={UID},gid={UID},mode=0777",
    }


def _host_config(
    housing: Housing, limits: Limits, folder: Path | None, volume: str | None
) -> dict[str, Any]:
    memory_bytes = limits.memory_mb << 20
    config: dict[str, Any] = {
        "NetworkMode": "none",
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges"],
        "ReadonlyRootfs": True,
        "Init": False,  # keeper.py is one, and must be the first process itself
        "AutoRemove": False,  # how it ended is asked for afterwards
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "none", "Config": {}},
        "IpcMode": "private",
        "ShmSize": SHARED_MEMORY_MB << 20,
        "PidsLimit": limits.max_processes,
        "Memory": memory_bytes,
        "MemorySwap": memory_bytes,  # of both together: no swap
        # Where the whole machine runs out of memory, the candidate goes before anything of ours.
        "OomScoreAdj": 1000,
        "CpusetCpus": ",".join(map(str, housing.cpus)),
        "NanoCpus": len(housing.cpus) * 10**9,
        "Ulimits": [
            _ulimit("nofile", MAX_OPEN_FILES),
            _ulimit("fsize", limits.file_mb << 20),
            _ulimit("core", 0),
        ],
        # The owner is named because where a path exists in the image, its own mode stays.
        "Tmpfs": {
            SCRATCH: _tmpfs("exec", SCRATCH_MB, "0700"),  # compiled kernels are loaded from there
            "/tmp": _tmpfs("noexec", TMP_MB, "1777"),
        },
        "Mounts": _mounts(housing.programs, folder, volume),
    }
    if housing.runtime is not None:
        config["Runtime"] = housing.runtime
    if housing.gpu is not None:
        config["DeviceRequests"] = [
            {
                "Driver": "",
                "Count": 0,
                "DeviceIDs": [housing.gpu],
                "Capabilities": [["gpu", "compute", "utility"]],
                "Options": {},
            }
        ]
    return config


def _mounts(programs: Path, folder: Path | None, volume: str | None) -> list[dict[str, Any]]:
    mounts = [_bind(programs, PROGRAMS)]
    if folder is not None:
        mounts.append(_bind(folder, INSIDE))
    if volume is not None:
        mounts.append(
            {
                "Type": "volume",
                "Source": volume,
                "Target": OUT,
                "VolumeOptions": {"NoCopy": True},
            }
        )
    return mounts


def _bind(source: Path, target: str) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": True}


def _ulimit(name: str, value: int) -> dict[str, Any]:
    return {"Name": name, "Soft": value, "Hard": value}


def _tmpfs(execution: str, megabytes: int, mode: str) -> str:
    size = f"size={megabytes}m,nr_inodes={MAX_INODES}"
    return f"rw,{execution},nosuid,nodev,{size},uid={UID},gid={UID},mode={mode}"


def _environment(limits: Limits, gpu: str | None) -> list[str]:
    """Return all that a candidate finds in its environment, beside what the image sets."""
    environment = {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "HOME": SCRATCH,
        "TMPDIR": SCRATCH,
        "TORCHINDUCTOR_CACHE_DIR": f"{SCRATCH}/inductor",
        "TRITON_CACHE_DIR": f"{SCRATCH}/triton",
        "USER": "candidate",
        "LOGNAME": "candidate",
        # Equal seeds must give equal runs, and a set of strings has the order of its hashes.
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Images made for GPUs ask for all of them.
        "NVIDIA_VISIBLE_DEVICES": gpu or "void",
    }
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(limits.threads)
    return [f"{name}={value}" for name, value in environment.items()]
