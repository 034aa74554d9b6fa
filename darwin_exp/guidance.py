"""What a person is told about the configuration: `--help`, and mistakes in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from darwin_exp.config import CONF, PROJECT
from darwin_exp.schema import GROUPS, SCHEMAS, DarwinConfig


def variants(group: str) -> dict[str, str]:
    """Return a group's variants, each with the first comment line of its file.

    They lie in conf/, apart from sweeps.
    """
    found = {}
    for path in sorted(((PROJECT if group == "sweeps" else CONF) / group).glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        found[path.stem] = next(
            line.removeprefix("#").strip() for line in lines if not line.startswith("# @")
        )
    return found


def help_text() -> str:
    """Return what `python -m darwin_exp --help` prints."""
    lines = [
        "DARWIN evolves GPT training code and measures what it gained.",
        "",
        "  python -m darwin_exp +experiment=NAME [group=variant] [key=value] [+debug=tiny]",
        "  python -m darwin_exp -m +experiment=baseline memory=json,off seed=0,1,2",
        "  python -m darwin_exp -cd . +experiment=NAME +sweeps=NAME",
        "  python -m darwin_exp resume=RUN_ID|latest [n_generations=20] [max_hours=8]",
        "  python -m darwin_exp.compare SWEEP_ID|latest",
        "",
        "Experiments (whole recipes; add with +experiment=NAME)",
    ]
    for group, title in (
        ("experiment", ""),
        ("population", "Populations of equal numbers of trainings (add with +population=NAME)"),
        ("debug", "Debugging (add with +debug=NAME)"),
        ("sweeps", "Sweeps (run by these commands; the same one with sweep=latest goes on)"),
    ):
        if title:
            lines += ["", title]
        lines += [f"  {name:<12} {first}" for name, first in variants(group).items()]
    lines += ["", "Groups (choose with group=variant)"]
    lines += [f"  {group:<12} {', '.join(variants(group))}" for group in GROUPS]
    lines += ["", "Keys (set with key=value; * may change when a run is resumed)"]
    lines += [_key_line(name, entry) for name, entry in _described_keys()]
    lines += [
        "",
        "--cfg job prints the composed configuration; --info searchpath where it is read.",
    ]
    return "\n".join(lines)


def _described_keys() -> Iterator[tuple[str, Any]]:
    """Yield every key with its declaration: top-level ones first, then those of each group."""
    yield from _keys_of(DarwinConfig())
    for group, schemas in SCHEMAS.items():
        merged = {entry.name: entry for kind in schemas.values() for entry in fields(kind)}
        for name, entry in merged.items():
            if "help" in entry.metadata:
                yield f"{group}.{name}", entry


def _keys_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a typed configuration, and of those within it that are no group."""
    for entry in fields(config):
        if "help" in entry.metadata:
            yield f"{prefix}{entry.name}", entry
        elif entry.name not in GROUPS:
            yield from _keys_of(getattr(config, entry.name), f"{prefix}{entry.name}.")


def _key_line(name: str, entry: Any) -> str:
    mark = "*" if entry.metadata.get("operational") else " "
    return f" {mark}{name:<26} {entry.metadata['help']}"


def explain(error: BaseException) -> str:
    """Say what an error of Hydra or OmegaConf means, in one line that names the key."""
    text = " ".join(str(error).split())
    if found := re.search(r"Could not find '([^/']+)/([^']+)'", text):
        group, name = found.groups()
        if group == "sweeps" and name in variants("sweeps"):
            return f"sweeps={name}: it was not looked for here; add `-cd {_here(PROJECT)}`"
        known = ", ".join(variants(group)) or "none"
        return f"{group}={name}: there is no such variant; choose one of {known}"
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found[1])
    if found := re.search(r"Error merging override (\S+)", text):
        cause = str(error.__cause__ or error).splitlines()[0]
        return f"{found[1]}: {cause}"
    if found := re.search(r"Key '([^']+)' (?:is )?not in", text):
        return _unknown_key(str(getattr(error, "full_key", None) or found[1]))
    if found := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{found[1]} must be set: {found[1]}=VALUE"
    if found := re.search(r"Error parsing override '([^']*)'", text):
        return f"{found[1]}: an override reads key=value"
    if found := re.search(r"missing mandatory value: (\S+)", text):
        key = getattr(error, "full_key", None) or found[1]
        return f"{key} must be set: {key}=VALUE"
    if "raised while composing config" in text:
        text = text.split("raised while composing config:", 1)[1].strip()
        key = re.search(r"full_key: (\S+)", text)
        return f"{key[1] if key else 'the configuration'}: {text.split(' full_key:')[0]}"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key and str(key) not in first else first


def _here(path: Path) -> str:
    return "." if path == Path.cwd() else str(path)


def _unknown_key(key: str) -> str:
    known = [name for name, _ in _described_keys()] + list(GROUPS)
    if key in known:
        group = key.partition(".")[0]
        return f"{key}: the {group} chosen here has no such key; {group}=NAME chooses another"
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "`--help` lists the keys"
    return f"{key}: there is no such key; {hint}"
