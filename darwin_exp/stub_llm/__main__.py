"""`python -m darwin_exp.stub_llm`: a server of hand-written answers, until it is interrupted."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Sequence

from darwin_exp.stub_llm.answers import Kind
from darwin_exp.stub_llm.choosing import ANSWERS, MODELS, Author
from darwin_exp.stub_llm.faults import NAMED_FAULTS, every_so_often
from darwin_exp.stub_llm.protocol import FORMATS
from darwin_exp.stub_llm.server import StubServer

WRONG = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it, and return the exit code."""
    asked = _parser().parse_args(arguments)
    if asked.list:
        print(_table())
        return 0
    try:
        server = StubServer(
            Author(asked.seed, asked.only, [Kind(name) for name in asked.without]),
            host=asked.host,
            port=asked.port,
            faults=every_so_often(asked.faults) if asked.faults else None,
            delay_seconds=asked.delay,
            key=asked.key,
            formats=asked.formats,
            log=_say if asked.verbose else None,
        )
    except (OSError, ValueError, OverflowError) as error:
        _say(f"stub_llm: {error}")
        return WRONG
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with server, contextlib.suppress(KeyboardInterrupt):
        url = server.base_url
        print(
            f"{url} answers with hand-written text; try it with: "
            "python -m darwin_exp +experiment=llm mutator.model=stub-careful "
            f"mutator.base_url={url}",
            flush=True,
        )
        ended.wait()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m darwin_exp.stub_llm",
        description="Serve hand-written answers over OpenAI's wire protocol, to try a run with "
        "language models without a key. No language model is behind them: what a run with them "
        "reaches says nothing about what language models would reach.",
        epilog="Models: " + "; ".join(f"{name}, {model.about}" for name, model in MODELS.items()),
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8765, help="port to listen on; 0 takes any")
    parser.add_argument(
        "--delay", type=float, default=0.0, metavar="SECONDS", help="wait before each answer"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other answers")
    parser.add_argument("--key", help="refuse requests that do not bear this key")
    parser.add_argument(
        "--only",
        type=_names,
        default=(),
        metavar="NAME,...",
        help="give these answers only; drafts and repairs are restricted apart",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=(),
        metavar="KIND",
        choices=[kind.value for kind in Kind],
        help="never give answers of a kind: " + ", ".join(kind.value for kind in Kind),
    )
    parser.add_argument(
        "--formats",
        type=_names,
        default=FORMATS,
        metavar="FORMAT,...",
        help="response formats to accept, of " + ", ".join(FORMATS),
    )
    parser.add_argument(
        "--faults",
        metavar="FAULT/N,...",
        help="let one call in N fail, such as 429/10,cut/25; faults: " + ", ".join(NAMED_FAULTS),
    )
    parser.add_argument("--list", action="store_true", help="show all answers and end")
    parser.add_argument("--verbose", action="store_true", help="log every request")
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _table() -> str:
    wide = max(map(len, ANSWERS))
    lines = [
        f"{answer.name:<{wide}}  {answer.kind.value:<12}  {answer.summary}"
        for answer in ANSWERS.values()
    ]
    return "\n".join([f"{len(lines)} hand-written answers", *lines])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
