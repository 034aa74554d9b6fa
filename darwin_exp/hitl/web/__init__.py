"""The web door to a run's inbox: a local page to look at the evolution, to answer and to steer.

Reads: journal.sqlite and inbox.sqlite of one run.
Writes: inbox.sqlite.
Never: listens beyond this machine unless told to; needs the network, a build step, or the run to
be alive.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uvicorn import Server

    from darwin_exp.hitl.web.pages import Pages
    from darwin_exp.hitl.web.security import Door

PORT = 8787  # where it is free
MOST_CONNECTIONS = 64
QUIT_SECONDS = 2  # for which requests under way are waited for at the end
WRONG = 2  # exit code: the configuration or the environment
_SCREENS = {"DISPLAY", "WAYLAND_DISPLAY"}


def serve(
    run_folder: Path, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = False
) -> int:
    """Serve a run's page until somebody interrupts it, and return the exit code.

    Args:
        run_folder: the run's folder; the run need not be alive.
        host: address or name to listen on, one of this machine's.
        port: 0 takes any that is free; None takes 8787, or any where that is taken.
        open_browser: whether to open the page, too.
    """
    if not run_folder.is_dir():
        print(f"{run_folder}: no such run; `ls {run_folder.parent}` shows them", file=sys.stderr)
        return WRONG
    run_folder = run_folder.resolve()  # its name is the run's id
    try:
        listener = _listen_where_it_is_free(host) if port is None else listen(host, port)
    except (OSError, ValueError, OverflowError) as error:
        where, cure = (host, "--host") if port is None else (f"{host}:{port}", "--port")
        print(f"serve cannot listen on {where}: {error}; choose {cure}", file=sys.stderr)
        return WRONG
    with listener:
        server, pages, door = assemble(run_folder, host, listener)
        is_elsewhere = port is None and listener.getsockname()[1] != PORT
        try:
            return _serve(server, listener, door, host, open_browser, is_elsewhere)
        finally:
            pages.live.close()


def _serve(
    server: Server,
    listener: socket.socket,
    door: Door,
    host: str,
    open_browser: bool,
    is_elsewhere: bool,
) -> int:
    from darwin_exp.hitl.web.security import is_loopback

    where = f"; port {PORT} is taken" if is_elsewhere else ""
    print(f"DARWIN is at {door.link} (this link works once; Ctrl-C ends it{where})", flush=True)
    if not is_loopback(host):
        words = f"{host} is reached from outside, unencrypted: whoever can listen can take over"
        print(words, file=sys.stderr)
    # Without a screen Python would start a browser in this terminal, and wait for it.
    if open_browser and (sys.platform != "linux" or _SCREENS & os.environ.keys()):
        import webbrowser

        webbrowser.open(door.link)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        print("serve has ended; the run goes on without it")
    return 0


def _listen_where_it_is_free(host: str) -> socket.socket:
    try:
        return listen(host, PORT)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return listen(host, 0)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on one address of this machine.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
        ValueError: the address stands for all of them, so that no Host could be told from another.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    if address[0] in ("0.0.0.0", "::"):
        raise ValueError("name one address, not all of them")
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(MOST_CONNECTIONS)
    except OSError:
        listener.close()
        raise
    return listener


def assemble(run_folder: Path, host: str, listener: socket.socket) -> tuple[Server, Pages, Door]:
    """Return a server that is ready to run on a socket, its pages and its door.

    Whoever calls this closes the pages' live view.
    """
    import uvicorn

    from darwin_exp.hitl.inbox import person
    from darwin_exp.hitl.web.app import build_app
    from darwin_exp.hitl.web.pages import Pages
    from darwin_exp.hitl.web.security import LARGEST_HEAD, Door

    door = Door(host, listener.getsockname()[1])
    author = person("web")
    pages = Pages(run_folder, author, door.seal)
    config = uvicorn.Config(
        build_app(pages, door, author),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,  # errors only, by Python's own way, to standard error
        access_log=False,  # it would hold the link
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=LARGEST_HEAD,
        timeout_graceful_shutdown=QUIT_SECONDS,
    )
    return uvicorn.Server(config), pages, door
