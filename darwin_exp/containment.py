"""Containment: which sandbox a run's candidates live in, resolved and checked before it begins.

Reads: the configuration, this machine, the container engine.
Writes: nothing but what the configuration left open: the kind of sandbox, image and GPUs.
Never: takes something weaker than was asked for, or pulls an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from darwin_exp import schema
from darwin_exp.config import ConfigError
from darwin_exp.individual import SandboxSpec
from darwin_exp.protocols import SandboxUnavailable

Announce = Callable[[str], None]


def assign_gpus(box: schema.SandboxConfig, workers: int | None) -> int | None:
    """Give every slot a GPU of its own, where containers train on them.

    Args:
        workers: slots that were asked for; None leaves that to us.

    Returns:
        workers, or where that was None and GPUs decide it, how many there are.

    Raises:
        ConfigError: there are more slots than GPUs.
    """
    if not isinstance(box, schema.DockerConfig) or box.device != "cuda":
        return workers
    if not box.gpus:
        box.gpus = [str(k) for k in range(workers or 1)]
    if workers is not None and workers > len(box.gpus):
        raise ConfigError(
            f"workers={workers}: sandbox.gpus={box.gpus} names {len(box.gpus)}, and each slot has "
            f"a GPU of its own; use workers={len(box.gpus)}, or name more"
        )
    return workers if workers is not None else len(box.gpus)


def choose_sandbox(
    box: schema.SandboxConfig, announce: Announce, trusted: bool, may_fall_back: bool
) -> str | None:
    """Resolve what was left open, and refuse a sandbox that is absent or too weak for the code.

    Args:
        trusted: whether candidates hold this project's own code only.
        may_fall_back: whether sandbox=auto may take the weakest one.

    Returns:
        The name of the container image that was resolved; None where there is none.

    Raises:
        ConfigError: names the key, and the cure.
    """
    if box.name == "auto":
        _choose_strongest(box, announce, may_fall_back)
    elif box.name == "process":
        announce("sandbox: process, for careless code only. Stronger: sandbox=bubblewrap")
    try:
        image = _check(box)
    except SandboxUnavailable as missing:
        raise ConfigError(f"sandbox={box.name}: {missing}") from missing
    if image is not None:
        announce(f"sandbox: docker (no network, read-only system), image {image}")
    if box.name == "process" and not trusted and not box.allow_untrusted:
        raise ConfigError(
            "sandbox=process does not contain code of unknown origin, and this mutator brings "
            "some; use sandbox=bubblewrap, or say sandbox.allow_untrusted=true"
        )
    return image


def sandbox_spec(box: schema.SandboxConfig) -> SandboxSpec:
    """Return what a node needs to know to build the sandbox."""
    if isinstance(box, schema.DockerConfig):
        return SandboxSpec(
            box.name,
            box.allow_untrusted,
            box.uid,
            image=box.image or "",
            runtime=box.runtime,
            gpus=tuple(box.gpus),
        )
    return SandboxSpec(box.name, box.allow_untrusted, box.uid)


def environment_of(box: schema.SandboxConfig) -> dict[str, Any]:
    """Return what scores depend on here; the image's id stands for all that is in it."""
    environment: dict[str, Any] = {
        "device": box.device,
        "threads": box.threads,
        "sandbox": box.name,
    }
    if isinstance(box, schema.DockerConfig):
        environment |= {"image": box.image, "runtime": box.runtime}
    return environment


def _choose_strongest(box: schema.SandboxConfig, announce: Announce, may_fall_back: bool) -> None:
    from darwin_exp.sandbox.bubblewrap import BubblewrapSandbox

    try:
        BubblewrapSandbox.check()
        box.name = "bubblewrap"
        announce("sandbox: bubblewrap (no network, read-only system)")
    except SandboxUnavailable as missing:
        if not may_fall_back:
            raise ConfigError(
                f"sandbox=auto: {missing}; in a sweep say sandbox=process to do without"
            ) from missing
        box.name = "process"
        announce(f"sandbox: process, for careless code only. Stronger: {missing}")


def _check(box: schema.SandboxConfig) -> str | None:
    """Find out whether the sandbox can work here; pin the image of containers and name it."""
    if isinstance(box, schema.DockerConfig):
        return _check_containers(box)
    if box.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                "sandbox.device=cuda: torch finds no CUDA device here; use sandbox.device=cpu, or "
                "install a CUDA build of torch"
            )
    from darwin_exp.sandbox.bubblewrap import BubblewrapSandbox
    from darwin_exp.sandbox.process import ProcessSandbox

    (BubblewrapSandbox if box.name == "bubblewrap" else ProcessSandbox).check()
    return None


def _check_containers(box: schema.DockerConfig) -> str:
    """See `_check`. What torch on this machine can do says nothing of the one in the image."""
    from darwin_exp.image import ImageError, check_cuda, resolve_image
    from darwin_exp.sandbox.docker import DockerSandbox

    try:
        image, image_id = resolve_image(box.image)
        box.image = image_id
        DockerSandbox.check(sandbox_spec(box))
        for gpu in box.gpus:
            check_cuda(image_id, gpu, box.runtime)
    except ImageError as error:
        raise ConfigError(f"sandbox=docker: {error}") from error
    return image
