"""A stream socket with deadlines: lines, and messages that carry descriptors.

Every wait is bounded by a deadline for the whole step, so that a peer cannot prolong it by sending single
bytes. A received descriptor is closed on every path that does not return it.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import time
from collections.abc import Callable

from snapengine.errors import HandoverError
from snapengine.handover.message import MAX_FDS, ArrayScanner, Offer, parse_offer

PIECE_BYTES = 1 << 16
INT_BYTES = array.array("i").itemsize


class Wire:
    """One connection. Owns the socket; `close()` is idempotent.

    `gone` makes the exception for a connection that the other side has closed; its argument says what was
    awaited.
    """

    def __init__(self, sock: socket.socket, gone: Callable[[str], BaseException], wakeup: int = -1) -> None:
        self.sock = sock
        self._gone = gone
        self._wakeup = wakeup
        self._pending = bytearray()
        sock.setblocking(False)

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()

    def send(self, data: bytes, what: str, deadline: float) -> None:
        """Send all of `data` by `deadline` (time.monotonic()). HandoverError if that fails."""
        while data:
            try:
                data = data[self.sock.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, what, deadline)
            except (BrokenPipeError, ConnectionResetError):
                raise self._gone(what) from None

    def receive_line(self, what: str, max_bytes: int, deadline: float) -> bytes:
        """The next line without its newline."""
        searched = 0
        while (end := self._pending.find(b"\n", searched)) < 0:
            searched = len(self._pending)
            if searched > max_bytes:
                raise HandoverError(f"{what}: longer than {max_bytes} bytes")
            # No room for descriptors: the kernel drops those that come unasked.
            self._pending += self._receive(what, deadline, None)
        if end > max_bytes:
            raise HandoverError(f"{what}: longer than {max_bytes} bytes")
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line

    def receive_offer(self, deadline: float) -> tuple[Offer, list[int]]:
        """The hand-over message and its descriptors (the userfaultfd first), which the caller now owns.

        The descriptors may come with any part of the array, or after it, with one byte or with whitespace.
        """
        what = "hand-over message"
        fds: list[int] = []
        try:
            scanner = ArrayScanner()
            while not scanner.complete:
                self._check_rest(scanner.feed(self._receive(what, deadline, fds)))
            offer = parse_offer(scanner.data)
            while len(fds) < offer.fds_needed:
                self._check_rest(self._receive(f"descriptor {len(fds)} of the {what}", deadline, fds))
            return offer, fds
        except BaseException:
            close_all(fds)
            raise

    @staticmethod
    def _check_rest(rest: bytes) -> None:
        if len(rest) > 1 and rest.strip():
            raise HandoverError("hand-over message: other data after the JSON array")

    def _receive(self, what: str, deadline: float, fds: list[int] | None) -> bytes:
        room = 0 if fds is None else socket.CMSG_SPACE(MAX_FDS * INT_BYTES)
        while True:
            self._wait(select.POLLIN, what, deadline)
            try:
                data, ancillary, flags, _ = self.sock.recvmsg(PIECE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                raise self._gone(what) from None
            if fds is not None:
                _take_fds(ancillary, fds)
                if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
                    raise HandoverError(f"{what}: more than {MAX_FDS} descriptors")
            if not data:
                raise self._gone(what)
            return data

    def _wait(self, events: int, what: str, deadline: float) -> None:
        left = deadline - time.monotonic()
        poll = select.poll()
        poll.register(self.sock, events)
        if self._wakeup >= 0:
            poll.register(self._wakeup, select.POLLIN)
        ready = poll.poll(max(0, left) * 1000) if left > 0 else []
        if any(fd == self._wakeup for fd, _ in ready):
            raise self._gone(what)
        if not ready:
            raise HandoverError(f"{what}: not complete in time")


def _take_fds(ancillary: list[tuple[int, int, bytes]], fds: list[int]) -> None:
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.extend(array.array("i", payload[: len(payload) - len(payload) % INT_BYTES]))


def close_all(fds: list[int]) -> None:
    """Close every descriptor and empty the list, so that a second call closes nothing."""
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())
