"""The container sandbox: every candidate in a container of its own, made by a Docker engine.

A candidate sees the image, its working folder as /job, 256 MiB of shared memory, two folders in
memory for what it keeps for the moment, and nothing of this machine; it has no network and no
right that could be given up. The price is some 0.3 seconds of the engine's time per launch, and an
import of torch. That the limits hold is measured on engine 20.10; what other runtimes (gVisor) and
GPUs add is inferred, because no test of ours had one.

It shares the kernel with this machine: that holds what is careless or after a reward, and not who
brings an exploit of the kernel. `runtime` takes a stronger one, and is never replaced by a weaker.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from darwin_exp.individual import SandboxSpec
from darwin_exp.protocols import InfrastructureFailure, Launch, Limits, SandboxUnavailable, Zone
from darwin_exp.sandbox import keeper, launcher, reaping
from darwin_exp.sandbox.container import REMOVE_SECONDS, Container
from darwin_exp.sandbox.engine import Engine, connect
from darwin_exp.sandbox.engine_calls import EngineFailure
from darwin_exp.sandbox.launcher import WARM_MODULES
from darwin_exp.sandbox.profile import (
    PROGRAMS,
    Housing,
    Plan,
    container_config,
    volume_options,
)
from darwin_exp.sandbox.reaping import OWNER_FILE, SANDBOX_LABEL
from darwin_exp.sandbox.removal import Removals
from darwin_exp.sandbox.supervised import SERVER
from darwin_exp.sandbox.trial import examine
from darwin_exp.sandbox.workfolder import WorkRoot

LIFETIME_SECONDS = 3600.0  # of a launch whose budget the sandbox is not told
IDLE_SECONDS = 10.0  # how long a GPU may take to be given back


class DockerSandbox:
    """Runs candidates in containers of a Docker engine on this machine."""

    name: ClassVar[str] = "docker"

    def __init__(
        self,
        slot: int,
        cpus: tuple[int, ...],
        options: SandboxSpec,
        server: Path = SERVER,
        modules: tuple[str, ...] = WARM_MODULES,
        run: str = "",
    ) -> None:
        """Connect to the engine, and remove what killed harnesses left in it.

        Args:
            slot: number of the slot that this sandbox serves; slot k uses the k-th GPU.
            cpus: the CPUs that its candidates may use.
            options: image, runtime and GPUs.
            server: program that answers for a model; see launcher.py.
            modules: what is imported before the ready signal, as far as it is installed.
            run: name of the run, for labels of launches that do not bring it.

        Raises:
            SandboxUnavailable: it cannot work here; the message says what would mend it.
        """
        if options.gpus and slot >= len(options.gpus):
            raise SandboxUnavailable(
                f"sandbox.gpus names {len(options.gpus)}, and slot {slot} needs one of its own: "
                f"name more, or use workers={len(options.gpus)}"
            )
        self._cpus = cpus
        self._options = options
        self._modules = modules
        self._run = run
        self._gpu = options.gpus[slot] if options.gpus else None
        self._token = secrets.token_hex(6)
        self._count = 0
        self._containers: set[Container] = set()
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._engine = connect()
        self._removals = Removals(self._engine)
        self._root = WorkRoot()
        reaping.register(self._token)
        self._end = weakref.finalize(
            self, _end, self._containers, self._removals, self._engine, self._root, self._token
        )
        try:
            (self._root.path / OWNER_FILE).write_text(reaping.owner())
            self._programs = self._root.path / "programs"
            self._programs.mkdir()
            self._programs.chmod(0o755)
            for program in (Path(launcher.__file__), Path(keeper.__file__), server):
                if program.is_file():
                    shutil.copyfile(program, self._programs / program.name)
                    (self._programs / program.name).chmod(0o444)
            self._server_file = self._programs / server.name
            examine(self._engine, options)
            with contextlib.suppress(EngineFailure):
                reaping.reap(self._engine)
        except EngineFailure as failure:
            self._end()
            raise SandboxUnavailable(str(failure)) from failure
        except BaseException:
            self._end()
            raise

    @classmethod
    def check(cls, options: SandboxSpec) -> None:
        """Find out whether it can work here, by starting one container and removing it.

        Raises:
            SandboxUnavailable: it cannot; the message says what would mend it.
        """
        with contextlib.closing(connect()) as engine:
            try:
                examine(engine, options)
            except EngineFailure as failure:
                raise SandboxUnavailable(str(failure)) from failure

    @property
    def isolated(self) -> bool:
        return True

    def warm_up(self) -> None:
        """Do nothing: the image was tried when the sandbox was made, and no process is shared."""

    def start(self, launch: Launch) -> Container:
        """Start a program; return once it has signalled ready, and all before it has been removed.

        Raises:
            InfrastructureFailure: it was not ready in time, or the sandbox was closed; or what ran
                before is still there.
        """
        started_at = time.monotonic()
        self._refuse_if_closed()
        if launch.zone is Zone.MODEL and not self._server_file.is_file():
            raise InfrastructureFailure("there is no program that could answer for a model")
        self._containers.difference_update([old for old in list(self._containers) if old.closed])
        gpu = self._free_gpu(launch.limits)
        try:
            work = self._root.new_folder(
                launch.genome, launch.inputs, launch.job, launch.zone is Zone.MODEL
            )
        except (OSError, ValueError) as error:
            raise InfrastructureFailure(f"cannot prepare a launch: {error}") from error
        self._count += 1
        name = f"candidate-{self._token}-{self._count}"
        plan = self._plan(launch, name, work.path, gpu)
        container = Container(self._engine, name, plan, work, self._removals)
        self._containers.add(container)
        try:
            self._refuse_if_closed()
            container.start(started_at, started_at + launch.limits.startup_seconds)
            self._removals.finish()
        except BaseException:
            with contextlib.suppress(InfrastructureFailure):  # what is left is reaped later
                container.close()
            with contextlib.suppress(InfrastructureFailure):
                self._removals.finish()
            raise
        return container

    def close(self) -> None:
        """End every container that is still alive and give back what is held. Idempotent."""
        self._closed.set()
        with self._ending:
            self._end()

    def _refuse_if_closed(self) -> None:
        if self._closed.is_set():
            raise InfrastructureFailure("the sandbox was closed")

    def _plan(self, launch: Launch, name: str, folder: Path, gpu: str | None) -> Plan:
        limits = launch.limits
        labels = self._labels(launch)
        token = secrets.token_hex(8)
        command = ["-I", "-S", f"{PROGRAMS}/{Path(keeper.__file__).name}", token]
        command += [launch.zone.value, str(limits.threads), ",".join(self._modules)]
        volume = None
        if launch.zone is Zone.TRAIN:
            volume = (volume_options(limits), labels)
        else:
            command += [f"{PROGRAMS}/{self._server_file.name}"]
        housing = Housing(
            image=self._options.image,
            runtime=self._options.runtime,
            gpu=gpu,
            cpus=self._cpus,
            programs=self._programs,
            labels=labels,
        )
        return Plan(
            zone=launch.zone,
            config=container_config(housing, command, limits, folder, name if volume else None),
            volume=volume,
            token=token,
            cpus=self._cpus,
            log_bytes=limits.log_bytes,
        )

    def _labels(self, launch: Launch) -> dict[str, str]:
        """Return what tells people, and who reaps, whose a container is."""
        told = {"run": self._run, **launch.labels, "launch": launch.name}
        labels = {f"darwin.{name}": value for name, value in told.items() if value}
        lifetime = launch.limits.startup_seconds + _budget_seconds(launch.job)
        return labels | reaping.ownership(self._token, lifetime)

    def _free_gpu(self, limits: Limits) -> str | None:
        """Return the GPU that a launch gets, once nobody computes on it; None without one.

        Raises:
            InfrastructureFailure: there is none for it, or somebody else uses it.
        """
        if limits.device == "cpu":
            return None
        if self._gpu is None:
            raise InfrastructureFailure(
                f"device={limits.device} needs a GPU for each slot: name them in sandbox.gpus"
            )
        # Two programs of one job, which answer for the same model, may well be there together.
        if not any(not container.closed for container in self._containers):
            deadline = time.monotonic() + IDLE_SECONDS
            while users := _gpu_users(self._gpu):
                if time.monotonic() > deadline:
                    raise InfrastructureFailure(
                        f"GPU {self._gpu} is in use by other processes: {', '.join(users)}"
                    )
                time.sleep(0.5)
        return self._gpu


def _budget_seconds(job: Mapping[str, Any]) -> float:
    budget = job.get("budget_seconds")
    return float(budget) if isinstance(budget, int | float) else LIFETIME_SECONDS


def _gpu_users(gpu: str) -> list[str]:
    """Return the processes that compute on a GPU; none where there is no nvidia-smi to ask.

    Raises:
        InfrastructureFailure: it does not say.
    """
    query = ["nvidia-smi", "-i", gpu, "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except FileNotFoundError:
        return []
    except (OSError, subprocess.SubprocessError) as error:
        raise InfrastructureFailure(
            f"nvidia-smi does not say who uses GPU {gpu}: {error}"
        ) from error
    return told.stdout.split()


def _end(
    containers: set[Container], removals: Removals, engine: Engine, root: WorkRoot, token: str
) -> None:
    for container in list(containers):
        with contextlib.suppress(InfrastructureFailure, OSError):
            container.close()
    with contextlib.suppress(InfrastructureFailure):
        removals.finish()
    reaping.unregister(token)
    with contextlib.suppress(EngineFailure):  # what resisted then is tried once more
        for name in {left.name for left in engine.labelled(f"{SANDBOX_LABEL}={token}")}:
            engine.purge(name, REMOVE_SECONDS)
    engine.close()
    with contextlib.suppress(OSError):
        root.remove()
