"""`python -m darwin_exp.report RUN`: write a run's report again from its journal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from darwin_exp.chronicle import Chronicle
from darwin_exp.journal import FILE_NAME as JOURNAL
from darwin_exp.journal import JournalError
from darwin_exp.report import write_from

RUNS = Path(__file__).resolve().parents[2] / "runs"
OK, WRONG = 0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report that the command line asks for, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m darwin_exp.report",
        description="Writes report.html and plots/*.png of a run from its journal, and from the "
        "ablation of its champion where there is one. The run "
        "may be going on, interrupted or finished. The page is one file that needs no network.",
        epilog="examples: python -m darwin_exp.report latest; "
        "python -m darwin_exp.report 261121-2309-a220 --runs /data/runs",
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run's id, the path of its folder, or latest for the newest"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=RUNS,
        metavar="FOLDER",
        help="where the runs lie (default: runs/ in the checkout)",
    )
    chosen = parser.parse_args(arguments)
    try:
        run_folder = _folder(chosen.runs, chosen.run)
        chronicle = Chronicle.read(run_folder)
    except (JournalError, ValueError) as error:
        return _refuse(str(error))
    try:
        print(write_from(chronicle, run_folder))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}")
    return OK


def _folder(runs: Path, name: str) -> Path:
    """Return the folder of a run by its id or path.

    Raises:
        JournalError: there is none.
    """
    for candidate in (runs / name, Path(name)):
        if (candidate / JOURNAL).is_file():
            return candidate.resolve()
    known = sorted((path.parent.name for path in runs.glob(f"*/{JOURNAL}")), reverse=True)
    newest = [one for one in known if one != "latest"][:3]
    hint = f"the newest are {', '.join(newest)}" if newest else "there are none yet"
    raise JournalError(f"{name}: no such run in {runs}; {hint}")


def _refuse(message: str) -> int:
    print(f"darwin_exp.report: {message}", file=sys.stderr)
    return WRONG


if __name__ == "__main__":
    sys.exit(main())
