"""`python -m darwin_exp.compare SWEEP_ID|RUN_ID...`: settings side by side."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from darwin_exp import sweep as sweeps
from darwin_exp.compare.closing import Reading, close_sweep, leave, title_of
from darwin_exp.compare.comparison import compare
from darwin_exp.compare.tables import rich_table
from darwin_exp.config import PROJECT, ConfigError

WRONG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare what was named and return the exit code."""
    asked = _parser().parse_args(arguments)
    runs = (PROJECT / asked.runs).resolve()
    try:
        sweep_folders, run_folders = _resolve(runs, asked.names)
        _show(runs, asked.output, sweep_folders, run_folders)
    except ConfigError as error:
        _say(str(error))
        return WRONG
    except OSError as error:
        _say(f"{error.filename}: {error.strerror}; choose another folder with --output")
        return WRONG
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m darwin_exp.compare",
        description="Compare runs, setting by setting: mean, spread and n of what each came to, "
        "and the best so far against the rewrites it took. Reads journals alone.",
        epilog="A sweep's comparison is left in the sweep's folder and, where the sweep is "
        "tracked, on its run in MLflow; that of other runs in runs/comparisons/.",
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="SWEEP_ID|RUN_ID|latest",
        help="sweeps, runs, or both; latest is the newest sweep; a folder will do as well",
    )
    parser.add_argument(
        "--runs", default="runs", metavar="FOLDER", help="where runs are kept (paths.runs)"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the files go, instead")
    return parser


def _resolve(runs: Path, names: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Return the folders of sweeps and those of single runs.

    Raises:
        ConfigError: a name belongs to neither.
    """
    sweep_folders: list[Path] = []
    run_folders: list[Path] = []
    for name in names:
        if name == sweeps.LATEST:
            sweep_folders.append(sweeps.find(runs, name))
            continue
        for place in (runs / "sweeps" / name, runs / name, Path(name).expanduser().resolve()):
            if (place / sweeps.PLAN).is_file():
                sweep_folders.append(place)
            elif (place / "journal.sqlite").is_file():
                run_folders.append(place.resolve())
            else:
                continue
            break
        else:
            raise ConfigError(f"{name}: no such sweep or run in {runs}; {_newest(runs)}")
    return sweep_folders, run_folders


def _newest(runs: Path) -> str:
    places = [*runs.glob(f"sweeps/*/{sweeps.PLAN}"), *runs.glob("*/journal.sqlite")]
    places = [place for place in places if not place.parent.is_symlink()]
    places.sort(key=lambda place: place.stat().st_mtime, reverse=True)
    known = ", ".join(place.parent.name for place in places[:3])
    return f"the newest are {known}" if known else "there are none yet"


def _show(
    runs: Path, output: Path | None, sweep_folders: Sequence[Path], run_folders: Sequence[Path]
) -> None:
    console = Console()
    if len(sweep_folders) == 1 and not run_folders and output is None:
        if not Reading.of_sweeps(sweep_folders).chronicles:
            raise ConfigError(f"sweep {sweep_folders[0].name}: none of its runs has begun yet")
        close_sweep(sweep_folders[0], None, console, _say)
        return
    of_sweeps, singles = Reading.of_sweeps(sweep_folders), Reading.of(run_folders)
    known = {one.run_id for one in of_sweeps.chronicles}
    chronicles = [
        *of_sweeps.chronicles,
        *(one for one in singles.chronicles if one.run_id not in known),
    ]
    remarks = (*of_sweeps.remarks, *singles.remarks)
    if not chronicles:
        raise ConfigError("; ".join(remarks) or "none of these runs has begun yet")
    others = len(chronicles) - len(of_sweeps.chronicles)
    named = [*map(title_of, sweep_folders), *([f"{others} run(s)"] if others else [])]
    comparison = compare(chronicles, " and ".join(named), remarks)
    folder = output or runs / "comparisons" / _name_of([one.run_id for one in chronicles])
    leave(comparison, folder)
    console.print(rich_table(comparison, console.width))
    console.print(f"{folder}: comparison.md, .json, .csv and curves.png", style="dim")


def _name_of(run_ids: Sequence[str]) -> str:
    """Return a name that is the same for the same runs, however they were listed."""
    digest = hashlib.sha256("\n".join(sorted(run_ids)).encode()).hexdigest()
    return f"{len(run_ids)}-runs-{digest[:8]}"


def _say(line: str) -> None:
    print(f"darwin: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
