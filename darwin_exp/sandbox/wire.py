"""Messages between the harness, the fork server and the supervisors: JSON over Unix sockets."""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

_HEADER = struct.Struct("!I")
MAX_DESCRIPTORS = 8


class Wire:
    """One end of a stream of messages, each a JSON object that may bring file descriptors."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send a message; the receiver gets duplicates of the descriptors.

        Raises:
            OSError: the other end is gone.
        """
        body = json.dumps(message).encode()
        socket.send_fds(self._socket, [_HEADER.pack(len(body))], descriptors)
        self._socket.sendall(body)

    def receive_with_descriptors(self) -> tuple[dict[str, Any], list[int]]:
        """Wait for a message and the descriptors sent with it; only for ends that expect them.

        Raises:
            EOFError: the other end is gone.
        """
        header, descriptors, _, _ = socket.recv_fds(self._socket, _HEADER.size, MAX_DESCRIPTORS)
        body = bytearray()
        if len(header) == _HEADER.size:
            (length,) = _HEADER.unpack(header)
            while len(body) < length and (chunk := self._socket.recv(length - len(body))):
                body += chunk
            if len(body) == length:
                return json.loads(body), descriptors
        raise EOFError("the other end is gone")

    def receive(self, deadline: float, interrupt: int | None = None) -> dict[str, Any]:
        """Wait for a message until `deadline` on the monotonic clock.

        Args:
            interrupt: a descriptor that ends the wait when it becomes readable.

        Raises:
            TimeoutError: the deadline passed.
            InterruptedError: `interrupt` became readable.
            EOFError: the other end is gone.
        """
        while (message := self._take()) is None:
            wait_readable(self.fileno(), deadline, interrupt)
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                raise EOFError("the other end is gone")
            self._received += chunk
        return message

    def _take(self) -> dict[str, Any] | None:
        if len(self._received) < _HEADER.size:
            return None
        end = _HEADER.size + _HEADER.unpack_from(self._received)[0]
        if len(self._received) < end:
            return None
        message: dict[str, Any] = json.loads(self._received[_HEADER.size : end])
        del self._received[:end]
        return message

    def close(self) -> None:
        self._socket.close()


def wait_readable(descriptor: int, deadline: float, interrupt: int | None = None) -> None:
    """Wait until a descriptor can be read (or is at its end); see `Wire.receive`."""
    _wait(descriptor, select.POLLIN, deadline, interrupt)


def wait_writable(descriptor: int, deadline: float, interrupt: int | None = None) -> None:
    """Wait until a descriptor can be written (or is broken); see `Wire.receive`."""
    _wait(descriptor, select.POLLOUT, deadline, interrupt)


def _wait(descriptor: int, event: int, deadline: float, interrupt: int | None) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if interrupt is not None:
        poll.register(interrupt, select.POLLIN)
    milliseconds = max(0.0, deadline - time.monotonic()) * 1000
    ready = [number for number, _ in poll.poll(milliseconds)]
    if interrupt is not None and interrupt in ready:
        raise InterruptedError("the sandbox was closed")
    if not ready:
        raise TimeoutError("the deadline passed")
