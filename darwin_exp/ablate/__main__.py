"""Take a run's champion apart, and say which parts of its change pay.

Each part (a built-in edit, or else a hunk of champion.patch) is removed in turn and what is left
is trained again with fresh seeds, beside base and whole champion, on the same slots and under the
same clock as in the run. What is found is shown and left in RUN/ablation/summary.json. It can be
interrupted: the same command goes on where it was, and asking for more seeds trains only those.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from darwin_exp import parts as workshop_of
from darwin_exp.ablate.display import Display
from darwin_exp.ablate.surroundings import find_run, prepare, read_run, refuse_to_drop
from darwin_exp.ablate.work import ALSO_UNCLEAR, DEFAULT_SEEDS, KEEP_ALL, WORTHLESS, Ablation
from darwin_exp.config import PROJECT, ConfigError
from darwin_exp.journal import Divergence, Journal, JournalError
from darwin_exp.protocols import Interrupted
from darwin_exp.signals import terminable
from darwin_exp.summary import BY_SIGNAL, WRONG
from darwin_exp.trials import Broken

_ENDING = (signal.SIGINT, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Take a champion apart and return the exit code."""
    chosen = _parser().parse_args(arguments)
    display = Display(Console())
    try:
        with display, terminable():
            return _ablate(chosen, display)
    except (ConfigError, JournalError, Broken, OSError) as error:
        print(f"darwin: {error}", file=sys.stderr)
        return WRONG
    except (KeyboardInterrupt, Interrupted):
        print("darwin: interrupted; the same command goes on", file=sys.stderr)
        return BY_SIGNAL


def _ablate(chosen: argparse.Namespace, display: Display) -> int:
    run_folder = find_run(chosen.run, chosen.runs)
    chronicle, champion = read_run(run_folder)
    if chosen.drop != KEEP_ALL:
        refuse_to_drop(chronicle)
    folder = run_folder / "ablation"
    workshop = prepare(run_folder, chronicle, display.note)
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        journal = Journal(folder)
    except JournalError as error:
        raise ConfigError(f"{run_folder.name}: its {error}") from error
    try:
        ablation = Ablation(
            chronicle, champion, workshop, journal, folder, display, chosen.n_seeds, chosen.drop
        )
        display.began(ablation.title())
        executor = workshop_of.build_executor(workshop, display.slot)
        try:
            return ablation.work(executor)
        finally:
            with _uninterrupted():
                executor.close(cancel=True)
    except Divergence as error:
        raise ConfigError(
            f"{folder}: the ablation was begun by code that took this champion apart in another "
            "way; move the folder away to begin again"
        ) from error
    finally:
        journal.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m darwin_exp.ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 2 cannot be done (one line says why), 3 some trainings were "
        "lost,\n130 interrupted",
    )
    parser.add_argument("run", metavar="RUN", help="a run's id, its folder, or latest")
    parser.add_argument(
        "n_seeds",
        nargs="?",
        type=_seeds,
        help=f"trainings of each variant, at least 2 (default {DEFAULT_SEEDS}, or as last time)",
    )
    dropping = parser.add_mutually_exclusive_group()
    dropping.add_argument(
        "--drop",
        action="store_const",
        default=KEEP_ALL,
        const=WORTHLESS,
        help="also train the champion without the parts that cost or came out worthless, against "
        "the whole one, and leave it in RUN/ablation/pruned/",
    )
    dropping.add_argument(
        "--drop-unclear",
        dest="drop",
        action="store_const",
        default=KEEP_ALL,
        const=ALSO_UNCLEAR,
        help="the same without every part that was not shown to pay; either is for runs whose "
        "fitness is perplexity, and is asked for anew each time",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=PROJECT / "runs",
        metavar="FOLDER",
        help="where runs are kept, if not in this checkout's runs/",
    )
    return parser


def _seeds(text: str) -> int:
    try:
        n = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seeds") from error
    if n < 2:
        raise argparse.ArgumentTypeError("a spread takes at least 2 seeds")
    return n


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold off Ctrl-C while what runs is ended; this takes seconds."""
    before = {which: signal.signal(which, signal.SIG_IGN) for which in _ENDING}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


if __name__ == "__main__":
    sys.exit(main())
