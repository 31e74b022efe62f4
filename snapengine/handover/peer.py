"""The memory of a process that hands itself over (a VMM, or the embedded guest).

Runs in the thread that runs the capture. Owns the socket, the pidfd and the passed memfds; the capture
owns the userfaultfd from `open` on. `snapengine.handover.message` defines the protocol and a peer's duties.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import json
import os
import select
import socket
import stat
import struct
import time
from typing import Any

from snapengine.errors import CaptureCancelled, HandoverError, SnapengineError, TargetGoneError
from snapengine.handover.check_offer import check_mapped
from snapengine.handover.connection import Wire, close_all
from snapengine.handover.listener import Listener
from snapengine.handover.message import ADDRESS_END, MAX_NAME_BYTES, Offer, strict_json
from snapengine.kernel.threads import ends
from snapengine.regions import Region

MAX_REPLY_BYTES = 64 << 20
SO_PEERPIDFD = 77  # Linux 6.5
UFFD_LINK = "anon_inode:[userfaultfd]"


class PeerTarget:
    """A `Target` that waits at a Unix socket for a process to hand its memory over.

    Parameters
    ----------
    path
        Where to listen, mode 0600. A stale socket is replaced. The file is removed once a peer has connected.
    timeout
        Seconds to wait for a peer; None: for ever.
    step_timeout
        Seconds for the whole hand-over message, and for each answer.
    method
        The method of the capture, which is sent to the peer.
    """

    can_pause = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        timeout: float | None = 10.0,
        step_timeout: float = 5.0,
        method: str = "",
    ) -> None:
        self.path = os.fspath(path)
        self.pid = 0
        self.pidfd = -1
        self.controls: frozenset[str] = frozenset()
        self._timeout = float("inf") if timeout is None else timeout
        self._step_timeout = step_timeout
        self._method = method
        self._wire: Wire | None = None
        self._memfds: list[int] = []
        self._owner = os.getpid()
        self._cancelled = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """Wait for a peer and take its memory over. The caller owns the returned userfaultfd.

        Raises
        ------
        HandoverError
            No peer came in time, or what it sent cannot be used; the text names the mapping.
        TargetGoneError
            The peer ended meanwhile.
        UnsupportedError
            The path is in use.
        CaptureCancelled
            `cancel` was called.
        """
        try:
            return self._open(features)
        except BaseException:
            self.close("failed")
            raise

    def _open(self, features: int) -> tuple[int, int, list[Region]]:
        if self._cancelled < 0 or self._wire is not None:
            raise HandoverError(f"{self.path}: a target can be opened once")
        listener = Listener(self.path)
        try:
            sock = listener.accept(time.monotonic() + self._timeout, self._cancelled)
        finally:
            listener.close()
        if sock is None:
            raise CaptureCancelled("cancelled while waiting for a peer")
        self._wire = Wire(sock, self._gone, self._cancelled)
        self._identify(sock)
        greeting = {"snapengine": 1, "features": features, "method": self._method}
        self._wire.send(_line(greeting), "greeting", self._deadline())
        offer, fds = self._wire.receive_offer(self._deadline())
        try:
            regions = self._check(offer, fds)
            uffd = fds.pop(0)
        except BaseException:
            close_all(fds)
            raise
        self._memfds = fds
        self.controls = offer.controls
        self.can_pause = {"pause", "resume"} <= offer.controls
        return self.pid, uffd, regions

    def _identify(self, sock: socket.socket) -> None:
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.pid = struct.unpack("3i", credentials)[0]
        if self.pid <= 0:
            raise HandoverError("the peer is in a process namespace that this process cannot see")
        try:
            self.pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
            os.set_inheritable(self.pidfd, False)
        except OSError:
            try:
                self.pidfd = os.pidfd_open(self.pid)
            except ProcessLookupError:
                raise TargetGoneError(f"the peer (process {self.pid}) has ended") from None

    def _check(self, offer: Offer, fds: list[int]) -> list[Region]:
        if _link(fds[0]) != UFFD_LINK:
            raise HandoverError("descriptor 0 of the hand-over message: not a userfaultfd")
        memfds = {mapping.memfd: fds[mapping.memfd] for mapping in offer.mappings if mapping.memfd > 0}
        for mapping in offer.mappings:
            if mapping.memfd > 0:
                _check_memfd(memfds[mapping.memfd], mapping.offset + mapping.length, mapping.name[:40])
        checked = check_mapped(self.pid, offer.mappings, memfds)
        return [
            Region(
                name=mapping.name,
                addr=mapping.addr,
                length=mapping.length,
                page_size=mapping.page_size,
                kind=found.kind,
                memfd=memfds.get(mapping.memfd, -1),
                memfd_offset=mapping.offset,
                zero_inode=found.zero_inode,
            )
            for mapping, found in zip(offer.mappings, checked, strict=True)
        ]

    def pause(self) -> None:
        """Stop the peer's writers; returns when they are stopped."""
        self._request("pause")

    def resume(self) -> None:
        """Resume the peer's writers."""
        self._request("resume")

    def vmstate(self) -> dict[str, bytes]:
        """The peer's named blobs; none if it did not announce any."""
        if "vmstate" not in self.controls:
            return {}
        blobs = self._request("vmstate").get("vmstate")
        if not isinstance(blobs, dict):
            raise HandoverError("vmstate: not an object")
        return {_blob_name(name): _blob(name, text) for name, text in blobs.items()}

    def stats(self) -> dict[str, Any]:
        """The peer's own counters; none if it did not announce any."""
        if "stats" not in self.controls:
            return {}
        stats = self._request("stats").get("stats", {})
        if not isinstance(stats, dict):
            raise HandoverError("stats: not an object")
        return stats

    def cancel(self) -> None:
        """End a wait of `open` or for an answer, by CaptureCancelled. For any thread or signal handler."""
        if self._cancelled >= 0:
            os.eventfd_write(self._cancelled, 1)

    def close(self, status: str) -> None:
        """Send the outcome to the peer, and close everything. Idempotent."""
        wire, self._wire = self._wire, None
        if wire is not None:
            with contextlib.suppress(SnapengineError, OSError):
                wire.send(_line({"cmd": "done", "status": status}), "done", time.monotonic() + 0.5)
            wire.close()
        close_all(self._memfds)
        for fd in (self.pidfd, self._cancelled):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self._cancelled = -1
        self.controls = frozenset()
        self.can_pause = False

    def __del__(self) -> None:
        # Not in a forked child, which shares the socket with its parent.
        if getattr(self, "_cancelled", -1) >= 0 and self._owner == os.getpid():
            self.close("failed")

    def _request(self, command: str) -> dict[str, Any]:
        if self._wire is None or command not in self.controls:
            raise HandoverError(f"{command}: the peer did not announce it")
        deadline = self._deadline()
        self._wire.send(_line({"cmd": command}), command, deadline)
        answer = strict_json(self._wire.receive_line(command, MAX_REPLY_BYTES, deadline), command)
        if not isinstance(answer, dict) or type(answer.get("ok")) is not bool:
            raise HandoverError(f"{command}: the answer is not an object with ok")
        if not answer["ok"]:
            raise HandoverError(f"{command}: the peer refused: {_one_line(answer.get('error', ''))}")
        return answer

    def _deadline(self) -> float:
        return time.monotonic() + self._step_timeout

    def _gone(self, what: str) -> BaseException:
        if self._cancelled >= 0 and select.select([self._cancelled], [], [], 0)[0]:
            return CaptureCancelled(f"cancelled while waiting for the peer ({what})")
        # A process that ends closes its sockets before its pidfd becomes readable.
        if self.pidfd >= 0 and (select.select([self.pidfd], [], [], 0)[0] or ends(self.pid)):
            return TargetGoneError(f"the peer (process {self.pid}) ended ({what})")
        return HandoverError(f"{what}: the peer closed the connection")


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _one_line(text: object) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())[:200]


def _link(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _check_memfd(fd: int, end: int, name: str) -> None:
    """The engine reads the memfd, so its owner must not be able to truncate it."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise HandoverError(f"mapping {name}: memfd: not a regular file")
    if status.st_size < end or end > ADDRESS_END:
        raise HandoverError(f"mapping {name}: memfd: {status.st_size} bytes are too few for {end}")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        raise HandoverError(f"mapping {name}: memfd: not readable")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if not seals & fcntl.F_SEAL_SHRINK:
        raise HandoverError(f"mapping {name}: memfd: not sealed against shrinking (F_SEAL_SHRINK)")


def _blob_name(name: str) -> str:
    if not name.isprintable() or not 0 < len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
        raise HandoverError(f"vmstate: a name is not a printable string of 1 to {MAX_NAME_BYTES} bytes")
    return name


def _blob(name: str, text: Any) -> bytes:
    if not isinstance(text, str):
        raise HandoverError(f"vmstate: {name[:40]}: not a string")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise HandoverError(f"vmstate: {name[:40]}: not base64") from None
