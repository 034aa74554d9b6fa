"""Finds the image that a run's candidates will live in, and pins it.

Reads: the engine's images, docker/Dockerfile, constraints.txt.
Writes: nothing.
Never: pulls or builds; what is not here is an error with its cure.
"""

from __future__ import annotations

import os

from darwin_exp.image.recipe import (
    BASE_NAME,
    KIND,
    TRAINER,
    ImageError,
    ImageMissing,
    tag_today,
)
from darwin_exp.image.store import Image, Store, one_line, open_store

_SEES_CUDA = "import torch; print(torch.version.cuda or 'none', torch.cuda.is_available())"


def resolve_image(configured: str | None = None) -> tuple[str, str]:
    """Return tag and id of an image; the id stays the same image whatever becomes of the tag.

    Args:
        configured: a name or an id; None takes what `make image` made last, if that is what it
            would make today.

    Raises:
        SandboxUnavailable: no engine answers.
        ImageMissing: it is not here.
        ImageError: the engine failed.
    """
    with open_store() as store:
        if configured is None:
            return _made_here(store)
        found = store.find(configured)
        if found is None:
            raise ImageMissing(
                f"the container engine has no image {configured}, and a run never pulls one; fetch "
                "it with `docker pull`, or leave sandbox.image out and run `make image`"
            )
        return _name_of(found, configured), found.id


def check_cuda(image_id: str, gpu: str, runtime: str | None = None) -> None:
    """Find out whether torch in an image can compute on a GPU of this machine.

    Raises:
        SandboxUnavailable: no engine answers.
        ImageError: it cannot; the message says whose fault that is.
    """
    with open_store() as store:
        try:
            printed = store.run(image_id, _SEES_CUDA, runtime, gpu)
        except ImageError as error:
            raise ImageError(
                f"GPU {gpu} cannot be used in a container ({error}); install nvidia-container-"
                "toolkit and look at `nvidia-smi -L`"
            ) from error
    build, _, usable = (printed.splitlines() or [""])[-1].partition(" ")
    if build == "none":
        raise ImageError(
            "torch in the image is a build without CUDA; make it again where pip's index offers "
            "one with it: `python -m darwin_exp.image --force`"
        )
    if usable != "True":
        raise ImageError(
            f"torch in the image (CUDA {build}) finds GPU {gpu} unusable: {one_line(printed)}; "
            "update the driver, or use sandbox.device=cpu"
        )


def _made_here(store: Store) -> tuple[str, str]:
    """Return the newest training image whose recipe still holds, on BASE_IMAGE where one is set."""
    base = os.environ.get("BASE_IMAGE") or None
    made = store.labelled(KIND, TRAINER)
    if base is not None:
        made = [image for image in made if image.labels.get(BASE_NAME) == base]
    for image in made:
        today = tag_today(image.labels)
        if today in image.tags:
            return today, image.id
    on_base = f" on {base}" if base else ""
    if made:
        raise ImageMissing(
            f"the training image{on_base} was made from another docker/Dockerfile or other pins in "
            "constraints.txt; run `make image`"
        )
    raise ImageMissing(f"there is no training image{on_base} yet; run `make image`")


def _name_of(image: Image, configured: str) -> str:
    """Return a name that people know an image by."""
    if configured in image.tags or not image.tags:
        return configured
    return image.tags[0]
