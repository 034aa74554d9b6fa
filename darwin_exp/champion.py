"""The champion as a product: a folder that trains by itself and that the next run can start from.

Reads: a run's chronicle and summary; where its data lie.
Writes: runs/RUN_ID/champion/, and for an ablation a folder of the same form.
Never: leaves half a folder where a whole one was, or deletes what somebody else left in one.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darwin_exp.chronicle import Agent, Chronicle, Environment, environment_of
from darwin_exp.conditions import Conditions, ExtraFile
from darwin_exp.config import CONF, PROJECT
from darwin_exp.genome import OUTPUT_FOLDER
from darwin_exp.individual import DataSpec, Edit, Genome, TrainingSpec
from darwin_exp.protocols import Event
from darwin_exp.report.people import surroundings_in_words
from darwin_exp.wording import clean, number

PATCH, JOB, README = "champion.patch", "job.json", "README.md"
LONGEST_PARAMETERS = 80  # characters that are shown of an edit's parameters


def leave_champion(
    run_folder: Path,
    chronicle: Chronicle,
    summary: Mapping[str, Any],
    data: DataSpec,
    training: TrainingSpec,
) -> None:
    """Write `champion/` of a run, if its summary names a champion.

    Args:
        summary: as in summary.json; it decides who is champion.
        data: the run's own; what people granted besides is taken from the journal.
        training: how the run trained at first; the seed is replaced by the champion's own.

    Raises:
        OSError: the folder cannot be written.
        KeyError: the journal does not hold the champion's code.
    """
    champion = chronicle.agent((summary.get("champion") or {}).get("individual_id", ""))
    if champion is None:
        return
    folder = run_folder / "champion"
    trained = _search_job(chronicle, champion)
    seed = training.seed if trained is None else trained.payload["seed"]
    granted = _conditions(chronicle.claimed_in)
    leave_product(
        folder,
        chronicle.genome_of(champion.individual_id),
        chronicle.base_genome,
        job_file(granted.data(data), granted.training(training), seed),
        _readme(folder, chronicle, champion, summary),
    )


def job_file(data: DataSpec, training: TrainingSpec, seed: int) -> dict[str, Any]:
    """Return the job with which a folder trains by hand as it trained in the run."""
    return {
        "budget_seconds": training.budget_seconds,
        "max_steps": training.max_steps,
        "seed": seed,
        "device": training.device,
        "threads": training.threads,
        "vocab_size": data.vocab_size,
        "context_length": training.context_length,
        "train": str((data.folder / "train.bin").resolve()),
        "token_bytes": data.token_bytes,
        "extra_train": [str(path.resolve()) for path in data.extra_train],
        "out": OUTPUT_FOLDER,
    }


def leave_product(
    folder: Path, genome: Genome, base: Genome, job: Mapping[str, Any], readme: str
) -> None:
    """Write a genome with its patch, a job and a README, whole or not at all.

    Where the folder holds this code already, only what stands beside the code is renewed, so that
    a model trained there stays. A folder with other code is replaced if it is just as it was left
    here; if anybody has trained in it, edited it or put something into it, it is kept under another
    name.

    Raises:
        OSError: the folder cannot be written.
    """
    beside = {
        PATCH: genome.patch_from(base),
        JOB: json.dumps(job, indent=2) + "\n",
        README: readme,
    }
    before = _genome_in(folder)
    if before == genome:
        (folder / OUTPUT_FOLDER).mkdir(exist_ok=True)
        for name, text in beside.items():
            _write(folder / f".{name}.new", text).replace(folder / name)
        return
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    for path, text in (*genome.files, *beside.items()):
        (fresh / path).parent.mkdir(parents=True, exist_ok=True)
        _write(fresh / path, text)
    (fresh / OUTPUT_FOLDER).mkdir()
    replaced = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)  # of a process that was killed in between
    if _is_as_left(folder, before, base):
        folder.rename(replaced)
    elif folder.exists():
        folder.rename(_unused(folder, "kept" if before is None else before.id[:8]))
    fresh.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _genome_in(folder: Path) -> Genome | None:
    try:
        return Genome.from_folder(folder)
    except (ValueError, OSError):
        return None


def _is_as_left(folder: Path, genome: Genome | None, base: Genome) -> bool:
    """Tell whether a folder holds what was left there and nothing else; its patch tells what."""
    if genome is None:
        return False
    found = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    try:
        patch = (folder / PATCH).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return patch == genome.patch_from(base) and found <= {*genome.as_dict, PATCH, JOB, README}


def _unused(folder: Path, mark: str) -> Path:
    """Return a name beside a folder that nothing has yet."""
    marks = (f"{mark}-{k}" if k > 1 else mark for k in itertools.count(1))
    paths = (folder.with_name(f"{folder.name}-{one}") for one in marks)
    return next(path for path in paths if not os.path.lexists(path))


def _write(path: Path, text: str) -> Path:
    """Write a file and wait until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


def _search_job(chronicle: Chronicle, champion: Agent) -> Event | None:
    """Return the training by which an individual was judged in the environment of the claim."""
    here = chronicle.claimed_in.index
    for event in chronicle.of_kind("job"):
        if environment_of(event) != here:
            continue
        ours = event.payload["individual_id"] == champion.individual_id
        same_code = event.payload["genome_id"] == champion.genome_id
        judged = event.payload.get("purpose") in ("search", "base_repeat")
        if ours and judged and same_code and event.payload["status"] == "OK":
            return event
    return None


def _conditions(environment: Environment) -> Conditions:
    """Return what an environment changes of the run's own, as far as a training by hand can."""
    told = environment.changed
    extra = tuple(
        ExtraFile(one["file"], one["content_hash"]) for one in told.get("extra_train", ())
    )
    return Conditions(
        extra,
        budget_seconds=told.get("budget_seconds"),
        max_steps=told.get("max_steps"),
        memory_mb=told.get("memory_mb"),
    )


# --- README.md -----------------------------------------------------------------------------------


def _readme(folder: Path, chronicle: Chronicle, champion: Agent, summary: Mapping[str, Any]) -> str:
    run_id = chronicle.run_id
    is_base = champion.is_base or champion.genome_id == chronicle.base_genome.id
    head = [
        f"# The champion of run {run_id}",
        "",
        f"`{champion.individual_id}`, generation {champion.generation}; code "
        f"`{champion.genome_id[:12]}`; found by `{clean(chronicle.command)}`.",
    ]
    if is_base:
        head += ["", "It is the base itself: the run found no code that did better."]
    parts = [
        *head,
        "",
        "## What was measured",
        "",
        *_measured_lines(summary),
        "",
        "## What was changed",
        "",
        *_edit_lines(champion.edits),
        "",
        *_environment_lines(chronicle),
        "## Train it",
        "",
        *_code("cd " + _shown(folder), f"python train.py {JOB}"),
        "It takes PyTorch, NumPy and safetensors, and nothing of DARWIN. The run's own budget,",
        "threads and context length, the seed of this individual's training and the place of the",
        f"training text stand in `{JOB}`. The model is left in `{OUTPUT_FOLDER}/`.",
        "",
        "## Apply the patch",
        "",
        f"`{PATCH}` turns the run's base, settings included, into this code:",
        "",
        *_code(
            f"cp -r {_shown(folder.parent / 'individuals' / chronicle.agents[0].individual_id)}"
            "/code patched",
            f"patch -p1 -d patched < {_shown(folder / PATCH)}",
        ),
        "## Evolve it further",
        "",
        *_code(next_command(chronicle, folder)),
        "## Take it apart",
        "",
        *_code(ablate_command(chronicle, folder.parent)),
        "That removes each part of the change in turn and trains again with fresh seeds, so that",
        "parts that do not pay are named.",
    ]
    return "\n".join(parts) + "\n"


def _environment_lines(chronicle: Chronicle) -> list[str]:
    """Say what people granted of that in which base and champion were measured."""
    here = chronicle.claimed_in
    if not here.index:
        return []
    changed = surroundings_in_words(chronicle, here)
    lines = [f"- {clean(words)}" for words in changed] or [
        "- nothing any more: the run's own again"
    ]
    extra = [f"- `{_shown(Path(one['file']))}`" for one in here.changed.get("extra_train", ())]
    if extra:
        lines += [
            "",
            f"`{JOB}` names the files of that text, which are prepared already:",
            "",
            *extra,
        ]
    return [
        "## What it was measured with",
        "",
        f"Base and champion were both measured in environment {here.index}, opened for",
        f"generation {here.generation} (`{clean(here.environment_id)}`). What people granted:",
        "",
        *lines,
        "",
        "An evolution that is begun anew, as below, begins without it.",
        "",
    ]


def _measured_lines(summary: Mapping[str, Any]) -> list[str]:
    """Say what a run's summary claims of its champion, and plainly where it claims nothing."""
    gain: Mapping[str, Any] = summary.get("improvement") or {}
    base: Mapping[str, Any] = summary.get("baseline") or {}
    champion: Mapping[str, Any] = summary.get("champion") or {}
    by_steps = gain.get("n_steps") is not None  # then time decided nothing
    lines = [
        *([] if by_steps else [f"- At equal wall-clock: {_claim(gain)}"]),
        f"- At equal steps: {_claim(gain.get('equal_steps') or {})}",
        "",
        "| | base | champion |",
        "|---|---|---|",
    ]
    for label, key in (
        ("test perplexity", "test_perplexity"),
        ("validation perplexity", "val_perplexity"),
        ("validation bits per byte", "val_bpb"),
        ("MFU", "mfu"),
        ("fresh trainings behind the claim", "replicates"),
    ):
        lines.append(f"| {label} | {number(base.get(key))} | {number(champion.get(key))} |")
    return lines


def _claim(gain: Mapping[str, Any]) -> str:
    percent, interval, p_value = (
        gain.get(key) for key in ("perplexity_percent", "ci95", "p_value")
    )
    if percent is None:
        why = clean(str(gain.get("why_none") or ""))
        return f"not measured ({why})." if why else "not measured."
    direction = "lower" if percent >= 0 else "higher"
    words = f"test perplexity {abs(percent):.2f} % {direction} than the base's"
    if interval is not None and p_value is not None:
        words += (
            f" (95 % interval of the gain {interval[0]:+.2f} to {interval[1]:+.2f} %, "
            f"p = {p_value:.2g})"
        )
    if not gain.get("significant"):
        return f"no significant progress: {words}, and chance alone can explain that."
    return f"{words}: significant." if percent > 0 else f"{words}: significantly worse."


def _edit_lines(edits: Sequence[Edit]) -> list[str]:
    """Return a line of Markdown for each edit, oldest first."""
    lines = []
    for edit in edits:
        shown = ", ".join(f"{key} {value}" for key, value in edit.parameters.items())
        bracket = f" ({clean(shown)})" if 0 < len(shown) <= LONGEST_PARAMETERS else ""
        lines.append(f"- `{edit.operator}` in `{edit.file}`{bracket}: {clean(edit.why)}")
    return lines or ["Nothing."]


def ablate_command(chronicle: Chronicle, run_folder: Path) -> str:
    """Return the command that takes a run's champion apart."""
    at_home = run_folder.resolve().parent == PROJECT / "runs"
    return f"python -m darwin_exp.ablate {chronicle.run_id if at_home else _shown(run_folder)}"


def next_command(chronicle: Chronicle, genome_folder: Path) -> str:
    """Return the command of a run like this one that starts from another base.

    What was typed is kept. Data set and context length are named whether or not they were typed,
    because the run may have fallen back, or been typed in another folder.
    """
    config = chronicle.config
    typed = shlex.split(chronicle.command)[3:]  # after python -m darwin_exp
    if any(word.startswith("resume=") for word in typed):  # it says nothing of the recipe
        recipe = str(config.get("experiment"))
        typed = (
            [f"+experiment={recipe}"] if (CONF / "experiment" / f"{recipe}.yaml").is_file() else []
        )
        for key in ("budget_seconds", "max_steps", "seed"):
            value = config.get(key)
            typed.append(f"{key}={'null' if value is None else value}")
    named = {
        "genome.dir": str(_from_checkout(genome_folder)),
        "dataset": config.get("dataset.name"),
        "dataset.path": config.get("dataset.path"),
        "trainer.context_length": config.get("trainer.context_length"),
    }
    dropped = {*named, "+sweeps"}
    kept = [word for word in typed if word.partition("=")[0] not in dropped]
    kept += [f"{key}={_quoted(str(value))}" for key, value in named.items() if value is not None]
    return f"python -m darwin_exp {shlex.join(kept)}"


def _quoted(value: str) -> str:
    """Quote a value as Hydra reads it, where it holds what Hydra gives a meaning to."""
    if re.fullmatch(r"[\w./+@-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _from_checkout(path: Path) -> Path:
    resolved = path.resolve()
    return resolved.relative_to(PROJECT) if resolved.is_relative_to(PROJECT) else resolved


def _shown(path: Path) -> str:
    """Return a path as one types it in the checkout."""
    return shlex.quote(str(_from_checkout(path)))


def _code(*lines: str) -> list[str]:
    return ["```", *lines, "```", ""]
