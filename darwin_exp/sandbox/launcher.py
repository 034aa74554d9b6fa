"""The first program inside a sandbox: warm up, say so, hand over to genome code.

A self-contained script (standard library, and torch where it is installed), so that it can be
mounted into any sandbox alone. Its working directory holds `job.json`, `code/`, `in/`, `out/`.

Reads: job.json.
Writes: one byte on the ready descriptor, which it then closes so that genome code cannot.
Never: trusts anything after the hand-over; what follows may rewrite this very module.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib.util
import json
import os
import sys
import tempfile
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

READY_FD, CHANNEL_READ_FD, CHANNEL_WRITE_FD = 3, 4, 5
OUT_OF_MEMORY_CODE = 86  # a hint from untrusted code, and no more than that
# The first optimizer of any kind imports it: over a second, which would be training time.
TRAINING_ONLY = "torch._dynamo"
WARM_MODULES = ("torch", "numpy", "safetensors.torch", TRAINING_ONLY)

Serve = Callable[[dict[str, Any], Path, Any, Any], None]


def warm_up(modules: Sequence[str]) -> None:
    """Import what every genome imports, as far as it is installed; start no thread."""
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def load_server(path: Path) -> Serve:
    """Load the program that answers for a model, from its file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    spec = importlib.util.spec_from_file_location("logits_server", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    serve: Serve = module.serve
    return serve


def launch(zone: str, threads: int, serve: Serve | None) -> int:
    """Signal ready, run the genome in the working directory, and return an exit status.

    Args:
        zone: "train" runs code/train.py; "model" answers on the channel.
        serve: the program that answers for a model; unused in "train".
    """
    folder = Path.cwd()
    code = str(folder / "code")
    job_path = folder / "job.json"
    with contextlib.suppress(OSError, AttributeError):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        faulthandler.enable()
    _use_threads(threads)
    _be_oneself()
    os.write(READY_FD, b"R")
    os.close(READY_FD)
    sys.path.insert(0, code)  # before, nothing of the genome's may be found
    try:
        if zone == "train":
            sys.argv = ["train.py", str(job_path)]
            _run_as_main(os.path.join(code, "train.py"))
        else:
            assert serve is not None, "no model server was given"
            job = json.loads(job_path.read_text(encoding="utf-8"))
            with open(CHANNEL_READ_FD, "rb") as reader, open(CHANNEL_WRITE_FD, "wb") as writer:
                serve(job, folder, reader, writer)
    except SystemExit as end:
        return _exit_status(end)
    except BaseException as error:
        error.__traceback__ = _from_genome_on(error.__traceback__, code)
        traceback.print_exception(error)
        return OUT_OF_MEMORY_CODE if _is_out_of_memory(error) else 1
    return 0


def end(status: int) -> None:
    """End the process as an interpreter does, but without tearing down every module.

    A warm interpreter takes half a second to take itself apart, which nobody is there to enjoy.
    """
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(status)


def _run_as_main(path: str) -> None:
    """Run a file as the interpreter runs a script.

    `runpy` would set `sys.argv[0]` to the path and take `__main__` away again afterwards, while
    the genome's threads and exit functions may still need it.
    """
    program = types.ModuleType("__main__")
    program.__file__ = path
    sys.modules["__main__"] = program
    exec(compile(Path(path).read_bytes(), path, "exec"), program.__dict__)


def _use_threads(threads: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
        torch.set_num_interop_threads(threads)


def _be_oneself() -> None:
    """Drop what a forked interpreter inherited and would otherwise share with its siblings."""
    tempfile.tempdir = None
    # Torch would take its operator libraries apart at the end, a tenth of a second for nothing.
    # Finalisers that the genome makes register anew.
    atexit.unregister(weakref.finalize._exitfunc)  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()


def _exit_status(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def _from_genome_on(frames: TracebackType | None, code: str) -> TracebackType | None:
    """Drop the harness's own frames, so that a traceback starts where the genome does."""
    first = frames
    while first is not None and not first.tb_frame.f_code.co_filename.startswith(code):
        first = first.tb_next
    return first or frames


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
        or "cuda out of memory" in text
    )


def main() -> None:
    """Run as a script: `launcher.py ZONE THREADS MODULE,... [SERVER]`, in the working directory."""
    zone, threads, modules, *server = sys.argv[1:]
    needless = {"", TRAINING_ONLY} if zone == "model" else {""}
    warm_up([name for name in modules.split(",") if name not in needless])
    end(launch(zone, int(threads), load_server(Path(server[0])) if server else None))


if __name__ == "__main__":
    main()
