"""The stream of one container: what it answers, what it prints, and the keeper's last word.

All three come multiplexed through one socket, and nobody reads it but who waits for one of them:
so what is unread presses back on the container, and memory stays bounded here.

Reads: an attached stream, frame by frame, however it was cut on its way.
Writes: requests to a MODEL program.
Never: keeps more than the answers asked for, a bounded number of others, and the end of the log.

Source: the engine's API reference, "Attach to a container", for the format of frames.
"""

from __future__ import annotations

import select
import signal
import socket
import struct
import time

from darwin_exp.protocols import Zone
from darwin_exp.sandbox import keeper
from darwin_exp.sandbox.supervision import READY, Log

CHUNK_BYTES = 1 << 18
MAX_UNREAD_BYTES = 32 << 20  # answers that nobody has asked for yet
# A flood of output is read no faster than this, so that it costs no neighbour's time.
PRINTED_BYTES_PER_SECOND = 16e6
FRAME_COST_BYTES = 512  # to take a frame apart costs as much as so many bytes, however short it is
BURST_SECONDS = 1.0

_FRAME = struct.Struct(">BxxxL")  # which output, how many bytes
_ANSWERS = 1  # what is written to standard output; everything else is there to be read by people


class Stream:
    """What one container answers and prints.

    Attributes:
        ready_at: time.monotonic() of the ready signal as it arrived; 0 before.
        status: exit status of training code as the keeper tells it; None before.
        over: nothing more will come: the container has ended, or the engine.
        log: the end of what was printed.
    """

    def __init__(self, zone: Zone, token: str, log_bytes: int, interrupt: int) -> None:
        """See `Plan` in container.py; `interrupt` is a descriptor that ends every wait."""
        self.ready_at = 0.0
        self.status: int | None = None
        self.over = False
        self.log = Log(log_bytes)
        self._zone = zone
        self._mark = keeper.mark(token)
        self._interrupt = interrupt
        self._socket: socket.socket | None = None
        self._header = bytearray()  # of a frame that has not fully come
        self._output, self._left = 0, 0  # the frame that is coming, and how much of it is to come
        self._answers = bytearray()
        self._held = b""  # printed, and perhaps the beginning of the mark
        self._resting_until = 0.0

    @property
    def attached(self) -> bool:
        return self._socket is not None

    def attach(self, stream: socket.socket) -> None:
        """Begin with a stream; see `Engine.attach`."""
        self._socket = stream

    def close(self) -> None:
        """Give the socket back and forget unread answers. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._answers.clear()

    @property
    def n_unread(self) -> int:
        """How many bytes of answers wait to be taken."""
        return len(self._answers)

    def is_full(self, wanted_bytes: int = 0) -> bool:
        """Say whether no more is read before answers are taken."""
        return len(self._answers) >= max(MAX_UNREAD_BYTES, wanted_bytes)

    def take(self, n_bytes: int) -> bytes:
        """Return the first answers that wait, so many bytes of them."""
        with memoryview(self._answers) as answers:
            taken = bytes(answers[:n_bytes])
        del self._answers[:n_bytes]
        return taken

    def write(self, data: memoryview) -> int:
        """Write what goes without waiting, and return how many bytes that was.

        Raises:
            ConnectionError: the container has ended, or the engine.
        """
        assert self._socket is not None
        try:
            return self._socket.send(data[:CHUNK_BYTES])
        except BlockingIOError:
            return 0

    def pump(self, until: float, events: int = select.POLLIN, wanted_bytes: int = 0) -> int:
        """Wait once, at most until then on the monotonic clock, and read what has come.

        Args:
            events: what to wait for; for POLLIN only as long as something may be read.
            wanted_bytes: of answers, to be read even if they are many.

        Returns:
            What poll told of the stream; 0 also where it is merely no time to read.

        Raises:
            InterruptedError: the interrupt was raised.
        """
        assert self._socket is not None
        now = time.monotonic()
        if self._resting_until > now:
            until = min(until, self._resting_until)
            events &= ~select.POLLIN
        if self.over or self.is_full(wanted_bytes):
            events &= ~select.POLLIN
        poll = select.poll()
        poll.register(self._interrupt, select.POLLIN)
        if events:
            poll.register(self._socket, events)
        found = dict(poll.poll(max(0.0, until - now) * 1000))
        if self._interrupt in found:
            raise InterruptedError("the sandbox was closed")
        told = found.get(self._socket.fileno(), 0)
        if events & select.POLLIN and told & ~select.POLLOUT:
            self._read(self._socket)
        return told

    def _read(self, stream: socket.socket) -> None:
        try:
            chunk = stream.recv(CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""  # the engine is gone
        self.over = not chunk
        data = memoryview(chunk)
        while data:
            if self._left:
                part = data[: self._left]
                self._left -= len(part)
                data = data[len(part) :]
                self._sort(bytes(part))
            else:
                missing = _FRAME.size - len(self._header)
                self._header += data[:missing]
                data = data[missing:]
                if len(self._header) == _FRAME.size:
                    self._output, self._left = _FRAME.unpack(self._header)
                    self._header.clear()

    def _sort(self, part: bytes) -> None:
        if self._output == _ANSWERS and not self.ready_at and part.startswith(READY):
            self.ready_at = time.monotonic()
            part = part[len(READY) :]
        if self._output == _ANSWERS and self._zone is Zone.MODEL:
            self._answers += part
            return
        cost = (FRAME_COST_BYTES + len(part)) / PRINTED_BYTES_PER_SECOND
        rested = max(self._resting_until, time.monotonic() - BURST_SECONDS)
        self._resting_until = rested + cost
        if self._output != _ANSWERS:  # in training, nothing but the ready signal is due there
            self._print(part)

    def _print(self, part: bytes) -> None:
        """Keep what was printed, but for the keeper's word on how training ended.

        What other processes print after that is kept as well.
        """
        if self.status is None and self._zone is Zone.TRAIN:
            part, self._held = self._held + part, b""
            at = part.find(self._mark)
            if at < 0:
                start = part.rfind(self._mark[:1], -len(self._mark))
                if start >= 0 and self._mark.startswith(part[start:]):
                    part, self._held = part[:start], part[start:]
            else:
                end = at + len(self._mark) + keeper.STATUS_BYTES
                if len(part) < end:
                    part, self._held = part[:at], part[at:]
                else:
                    self.status = _status(part[end - keeper.STATUS_BYTES : end])
                    part = part[:at] + part[end:]
        if part:
            self.log.add(part)


def _status(text: bytes) -> int:
    """Return the exit status that the keeper tells; whoever imitates it badly has crashed."""
    try:
        code = int(text)
    except ValueError:
        return 1
    return code if -signal.NSIG < code <= 255 else 1
