"""`make image`: make the image that sandbox=docker runs candidates in."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from darwin_exp.image.making import base_image, training_image
from darwin_exp.image.recipe import DEFAULT_BASE, ImageError
from darwin_exp.protocols import SandboxUnavailable

WRONG, BY_SIGNAL = 2, 130

DESCRIPTION = f"""\
Make the image that sandbox=docker runs candidates in: Python, torch, numpy, safetensors and a C++
compiler, and no code of DARWIN. Its tag is the hash of what it is made from, so that a second call
has nothing to do.

It begins with BASE_IMAGE ({DEFAULT_BASE} unless that is set). Where no image registry can be
reached, Debian's packages make the base (root, apt-get install debootstrap). The Python packages
come by this environment's pip, with its index.
"""
EXAMPLES = """\
examples:
  make image
  BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04 make image     for GPUs
  BASE_IMAGE=debootstrap make image                             without asking a registry first
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    wishes: dict[str, Any] = {
        "base": options.base,
        "compiler": not options.no_compiler,
        "force": options.force,
    }
    try:
        if options.base_only:
            print(base_image(_announce, **wishes))
        else:
            tag, image_id = training_image(_announce, **wishes)
            print(f"{tag} {image_id}")
    except (ImageError, SandboxUnavailable) as error:
        print(f"image: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("image: interrupted; what was finished is kept", file=sys.stderr)
        return BY_SIGNAL
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m darwin_exp.image",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", metavar="IMAGE", help="begin with this image, not BASE_IMAGE")
    parser.add_argument("--base-only", action="store_true", help="make the base, with no packages")
    parser.add_argument(
        "--no-compiler", action="store_true", help="leave g++ out; torch.compile then fails"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="build it again though it is there; renew the base itself with docker pull",
    )
    return parser


def _announce(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
