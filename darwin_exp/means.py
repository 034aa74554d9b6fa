"""Means: what approvals are carried out with: extra texts and images with libraries.

Reads: texts and packages that a person has approved.
Writes: through their makers, prepared texts and images; never a run's own data or image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darwin_exp.conditions import Conditions
from darwin_exp.hitl.asked import Refused
from darwin_exp.hitl.wishes import DatasetWish
from darwin_exp.protocols import SandboxUnavailable
from darwin_exp.trials import Broken

Found = tuple[str, dict[str, Any]]  # a sentence for people, and what the run needs to know


@dataclass(frozen=True)
class Means:
    """What effects are carried out with.

    Attributes:
        data_folder: the run's prepared data, which nothing changes.
        data_root: where extra texts are prepared.
        max_overlap: share of an extra text that may stand in what is held out, and is removed.
        dataset_sources: ways of getting text that the configuration allows.
        forbidden: folders that no extra text may be read from.
        image: of the run's containers; None where there are none.
        announce: told of every effect, in a sentence.
    """

    data_folder: Path
    data_root: Path
    max_overlap: float = 0.5
    dataset_sources: tuple[str, ...] = ()
    forbidden: tuple[Path, ...] = ()
    image: str | None = None
    announce: Callable[[str], None] = lambda _: None

    def dataset(self, wish: DatasetWish) -> Found:
        """Prepare an extra text, without anything that the run holds out."""
        from data import prepare_extra

        extra = prepare_extra(
            self.data_folder,
            wish.source,
            wish.path,
            wish.licence,
            wish.most_mb,
            self.data_root,
            self.max_overlap,
            self.announce,
            self.forbidden,
        )
        told = (
            f"extra training text of {extra.tokens:,} tokens is listed in the job's extra_train; "
            f"{extra.removed_blocks:,} blocks that stand in held-out text were removed"
        )
        return told, {
            "file": str(extra.file),
            "content_hash": extra.content_hash,
            "tokens": extra.tokens,
            "bytes": extra.n_bytes,
            "removed_blocks": extra.removed_blocks,
            "source": extra.source,
            "path": extra.path,
            "licence": extra.licence,
        }

    def library(self, requirement: str, image: str | None) -> Found:
        """Make an image that holds a library.

        Args:
            image: that it shall stand upon; None for the run's own.
        """
        from darwin_exp.image import with_library

        image = image or self.image
        if image is None:
            raise Refused("a library goes into a new image, and this run has none; sandbox=docker")
        made = with_library(image, requirement, self.announce)
        told = f"{made.requirement} may be imported ({', '.join(made.import_names)})"
        own = f"{made.requirement} "
        others = [one.partition(" ")[0] for one in made.packages if not one.startswith(own)]
        if others:
            told += f"; with it came {', '.join(others)}"
        return told, {
            "requirement": made.requirement,
            "image": made.image,
            "import_names": list(made.import_names),
            "packages": list(made.packages),
        }

    def image_with(self, requirements: Sequence[str]) -> str | None:
        """Return the image that holds these libraries and no other; None for the run's own."""
        from darwin_exp.image import with_libraries

        if self.image is None or not requirements:
            return None
        return with_libraries(self.image, requirements, self.announce)[-1].image

    def verify(self, conditions: Conditions) -> None:
        """See `Effects.verify`."""
        from darwin_exp.image import ImageError, image_is_here
        from data import DataError, verify_extra

        try:
            for extra in conditions.extra_train:
                verify_extra(Path(extra.file), extra.content_hash)
            is_here = conditions.image is None or image_is_here(conditions.image)
        except (DataError, ImageError, SandboxUnavailable) as error:
            raise Broken(str(error)) from error
        if not is_here:
            raise Broken(
                f"the container engine no longer has {str(conditions.image)[:19]}, which holds the "
                "approved libraries; load it again (docker load), or begin a new run"
            )


def expected_failures() -> tuple[type[Exception], ...]:
    """Return what keeps an approval from being carried out without being a defect of ours."""
    from darwin_exp.image import ImageError
    from data import DataError

    return (Refused, DataError, ImageError)


def passing_failures() -> tuple[type[Exception], ...]:
    """Return what may be otherwise in a while: no network, no container engine."""
    from data import DataUnavailable

    return (DataUnavailable, SandboxUnavailable)
