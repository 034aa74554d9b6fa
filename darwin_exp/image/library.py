"""A library that people approved, in an image of its own on top of the one that was there.

Reads: the image; wheels from the package index that pip is set up with.
Writes: an image of the container engine; temporary folders, removed again.
Never: runs code of the library, changes the image it begins with, or replaces a package in it.

Whoever asks the same of the same image again gets the same image, whatever the package index holds
by then: it is found by the image that it begins with and by what was asked.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from darwin_exp.image import debian
from darwin_exp.image.recipe import KIND, TRAINER, ImageError, ImageMissing
from darwin_exp.image.store import Announce, Image, Store, one_line, open_store, packed
from darwin_exp.image.wheels import (
    LibraryRefused,
    Requirement,
    fetch,
    parse_requirement,
    refuse_intruders,
    satisfies,
    unpack,
)

# Not TRAINER: `resolve_image` looks for what `make image` made, and takes none of these for it.
LIBRARY_KIND = "darwin-library"
LIBRARIES = "darwin.image.libraries"
PACKAGES = "darwin.image.packages"  # what came into this image and not into the one before
STAGE = "darwin.image.stage"  # of the first stage, which the engine keeps without a name
# The second stage begins with the image anew, so that its user, its entry point and all else stay.
_DOCKERFILE = """\
ARG BASE_IMAGE
FROM ${{BASE_IMAGE}} AS compiled
LABEL {stage}={digest}
USER root
COPY library {folder}
RUN python3 -I -m compileall -q -j 0 --invalidation-mode unchecked-hash {folder} >/dev/null || true
FROM ${{BASE_IMAGE}} AS library
COPY --from=compiled {folder} {folder}
COPY ["{path_file}", "{place}/"]
"""
# What an image's Python finds, without importing any of it.
_SURVEY = """
import importlib.metadata, importlib.util, inspect, json, pkgutil, re, site, sys
asked, installed, found = {asked!r}, {{}}, set()
for one in importlib.metadata.distributions():
    name = re.sub("[-_.]+", "-", one.metadata["Name"] or "").lower()
    if not name or name in installed:
        continue
    installed[name] = one.version
    for file in one.files or () if name == asked else ():
        module = inspect.getmodulename(file.name)
        if module and len(file.parts) > 1:
            module = file.parts[0]
        if module and module.isidentifier() and module != "bin":
            found.add(module)
modules = {{}}
for one in pkgutil.iter_modules():
    modules.setdefault(one.name, getattr(one.module_finder, "path", ""))
print(json.dumps({{
    "python": "%d.%d" % sys.version_info[:2],
    "place": site.getsitepackages()[0],
    "installed": installed,
    "modules": modules,
    "standard": sorted(sys.stdlib_module_names),
    "import_names": sorted(name for name in found if importlib.util.find_spec(name)),
}}))
"""


@dataclass(frozen=True)
class LibraryImage:
    """An image that holds a library.

    Attributes:
        image: its id.
        requirement: such as "einops==0.8.1".
        import_names: what code imports of the library itself, such as ("einops",).
        packages: what came into the image with it, itself among them, as requirements with the
            hash of their wheels, such as "einops==0.8.1 sha256:..."; none where the image held it
            already.
    """

    image: str
    requirement: str
    import_names: tuple[str, ...]
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Survey:
    """What the Python of an image finds.

    Attributes:
        python: its version, such as 3.11.
        place: a folder whose path files it reads.
        installed: name and version of each package.
        modules: each module that can be imported by its bare name, and where it lies.
        standard: names of the standard library's modules.
        import_names: modules of the package that was asked for.
    """

    python: str
    place: str
    installed: Mapping[str, str]
    modules: Mapping[str, str]
    standard: tuple[str, ...]
    import_names: tuple[str, ...]


def with_library(image_id: str, requirement: str, announce: Announce) -> LibraryImage:
    """Return the image that is another image and a library, and make it if needed.

    The library comes as wheels, with what it needs and the image does not hold. They are laid out
    in a folder behind all that the image's Python looks through.

    Args:
        image_id: of the image to begin with, which may hold libraries itself.
        requirement: see `parse_requirement`.
        announce: is told what happens, a line each.

    Raises:
        SandboxUnavailable: no engine answers.
        LibraryRefused: it is no pinned requirement, or would change what the image holds.
        ImageMissing: the image to begin with is not here.
        ImageError: pip finds no fitting wheels, or the engine failed.
    """
    return with_libraries(image_id, (requirement,), announce)[0]


def with_libraries(
    image_id: str, requirements: Sequence[str], announce: Announce
) -> tuple[LibraryImage, ...]:
    """Return the images that hold one library after another, each on top of the one before.

    Args:
        image_id: of the image to begin with.
        requirements: in their order; with none of them, no engine is asked.
        announce: is told what happens, a line each.

    Raises:
        SandboxUnavailable: no engine answers.
        LibraryRefused: one is no pinned requirement, or would change what is there before it.
        ImageMissing: the image to begin with is not here.
        ImageError: pip finds no fitting wheels, or the engine failed.
    """
    wanted = [parse_requirement(requirement) for requirement in requirements]
    made: list[LibraryImage] = []
    if wanted:
        with open_store() as store:
            for one in wanted:
                made.append(_added(store, made[-1].image if made else image_id, one, announce))
    return tuple(made)


def image_is_here(image_id: str) -> bool:
    """Say whether the engine still has an image: one that is made again would have another id.

    Raises:
        SandboxUnavailable: no engine answers.
        ImageError: it failed.
    """
    with open_store() as store:
        return store.find(image_id) is not None


def _added(store: Store, image_id: str, wanted: Requirement, announce: Announce) -> LibraryImage:
    base = store.find(image_id)
    if base is None:
        raise ImageMissing(f"the container engine has no image {image_id}; run `make image`")
    before = _survey(store, base.id, wanted)
    held = before.installed.get(wanted.name)
    if held is None:
        asked = json.dumps([base.id, str(wanted), _DOCKERFILE])
        digest = hashlib.sha256(asked.encode()).hexdigest()[:16]
        found = store.find(f"{TRAINER}:lib-{digest}")
        made = found or _made(store, base, wanted, digest, before, announce)
        packages = tuple(json.loads(made.labels[PACKAGES]))
        # Of one that was found as well: it may have been refused when it was made.
        after = _survey(store, made.id, wanted)
        _refuse_changes(before, after, wanted, packages)
        return LibraryImage(made.id, str(wanted), after.import_names, packages)
    if not satisfies(wanted, held):
        raise LibraryRefused(
            f"{wanted}: the image holds {wanted.name} {held}, which is never replaced; ask for "
            "that version, or run in another image"
        )
    _refuse_nothing(wanted, before)
    return LibraryImage(base.id, str(wanted), before.import_names)


def _made(
    store: Store,
    base: Image,
    wanted: Requirement,
    digest: str,
    before: _Survey,
    announce: Announce,
) -> Image:
    with tempfile.TemporaryDirectory(
        prefix="darwin-library-", dir=debian.scratch_folder()
    ) as scratch:
        wheels = fetch(wanted, before.python, before.installed, Path(scratch, "pip"), announce)
        context = Path(scratch, "context")
        context.mkdir()
        unpack(wheels, before.python, context / "library")
        try:
            refuse_intruders(context / "library", {*before.modules, *before.standard})
        except LibraryRefused as refusal:
            raise LibraryRefused(f"{wanted}: {refusal}; choose another library") from refusal
        folder = f"/opt/darwin/library-{digest}"
        # Path files are read in the order of their names: behind darwin.pth, which leads to torch.
        path_file = f"darwin_library_{digest}.pth"
        (context / path_file).write_text(f"{folder}\n", encoding="utf-8")
        text = _DOCKERFILE.format(
            folder=folder, path_file=path_file, place=before.place, stage=STAGE, digest=digest
        )
        (context / "Dockerfile").write_text(text, encoding="utf-8")
        earlier = base.labels.get(LIBRARIES)
        labels = {
            KIND: LIBRARY_KIND,
            LIBRARIES: f"{earlier}, {wanted}" if earlier else str(wanted),
            PACKAGES: json.dumps(_named(wheels)),
        }
        return _built(store, base, wanted, f"{TRAINER}:lib-{digest}", labels, context, announce)


def _built(
    store: Store,
    base: Image,
    wanted: Requirement,
    tag: str,
    labels: Mapping[str, str],
    context: Path,
    announce: Announce,
) -> Image:
    announce(f"building {tag}: {wanted} on {base.tags[0] if base.tags else base.id[:19]}")
    try:
        return store.build(
            packed(context, "--owner=0", "--group=0", "--mode=a+rX,go-w"),
            tag,
            target="library",
            arguments={"BASE_IMAGE": base.id},
            labels=labels,
            network="none",
            fresh=False,
            announce=lambda line: None if line.startswith("  Step ") else announce(line),
        )
    except ImageError as failure:
        raise ImageError(f"the image with {wanted} cannot be built: {failure}") from failure


def _survey(store: Store, image_id: str, wanted: Requirement) -> _Survey:
    printed = store.run(image_id, _SURVEY.format(asked=wanted.name))
    try:
        told = json.loads((printed.splitlines() or [""])[-1])
    except ValueError as error:
        raise ImageError(
            f"python3 of {image_id[:19]} does not say what it holds: {one_line(printed)}; run "
            "`make image`"
        ) from error
    return _Survey(
        python=told["python"],
        place=told["place"],
        installed=told["installed"],
        modules=told["modules"],
        standard=tuple(told["standard"]),
        import_names=tuple(told["import_names"]),
    )


def _refuse_changes(
    before: _Survey, after: _Survey, wanted: Requirement, packages: Sequence[str]
) -> None:
    """Check, in the image as it came out, that all is where it was and the library is there."""
    for name, version in before.installed.items():
        if after.installed.get(name) != version:
            raise LibraryRefused(f"{wanted} would change {name} {version} of the image")
    for name, place in before.modules.items():
        if after.modules.get(name) != place:
            raise LibraryRefused(f"{wanted} would change where the module {name} comes from")
    for package in (parse_requirement(named.partition(" ")[0]) for named in packages):
        found = after.installed.get(package.name)
        if found is None or not satisfies(package, found):
            raise ImageError(f"{package} is in the image, and its Python does not find it")
    _refuse_nothing(wanted, after)


def _refuse_nothing(wanted: Requirement, survey: _Survey) -> None:
    if not survey.import_names:
        raise LibraryRefused(f"{wanted} holds nothing that code could import")


def _named(wheels: Sequence[Path]) -> list[str]:
    """Name what comes in so that nothing stands for another: by version and by content."""
    from packaging.utils import parse_wheel_filename

    named = []
    for path in wheels:
        name, version, *_ = parse_wheel_filename(path.name)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        named.append(f"{name}=={version} sha256:{content}")
    return named
