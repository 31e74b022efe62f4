"""The Unix socket that peers connect to: one engine at a path, and no file left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from snapengine.base.descriptor import Descriptor
from snapengine.base.socketpath import path_too_long
from snapengine.errors import HandoverError, UnsupportedError


class Listener:
    """A listening socket at `path`, mode 0600, that accepts one peer. Owns the socket and the file.

    A stale socket, on which no process listens any more, is replaced.

    Raises
    ------
    UnsupportedError
        `path` is another kind of file, or another process listens there (errno EADDRINUSE), or it is too
        long.
    OSError
        The directory does not exist or may not be written to.
    """

    _identity: tuple[int, int] | None = None  # of the file, once it exists

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._owner = os.getpid()
        if fault := path_too_long(self.path):
            raise UnsupportedError(fault)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(self._sock.fileno(), 0o600)  # bind() gives the file the mode of the socket
            with _locked(self.path.parent):
                _make_room(self.path)
                self._bind()
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        # For an interrupt before the caller has the object. A forked child's copy owns nothing.
        if self._identity is not None and self._owner == os.getpid():
            self.close()

    def _bind(self) -> None:
        """The directory is locked. An interrupt between bind() and stat() must not leave the file."""
        try:
            self._sock.bind(os.fspath(self.path))
            status = os.stat(self.path)
            self._identity = (status.st_dev, status.st_ino)
            self._sock.listen(1)
        except BaseException:
            if self._identity is None and self._sock.getsockname():
                os.unlink(self.path)
            raise

    def accept(self, deadline: float, wakeup: int = -1) -> socket.socket | None:
        """The connection of the first peer; None if `wakeup` became readable first.

        HandoverError at `deadline` (time.monotonic()).
        """
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if wakeup >= 0:
            poll.register(wakeup, select.POLLIN)
        left = deadline - time.monotonic()
        ready = poll.poll(None if left == float("inf") else max(0, left) * 1000)
        if any(fd == wakeup for fd, _ in ready):
            return None
        if not ready:
            raise HandoverError(f"{self.path}: no peer connected in time")
        return self._sock.accept()[0]

    def close(self) -> None:
        """Stop listening and remove the file, unless it has been replaced by another one. Idempotent."""
        if self._identity is not None:
            with contextlib.suppress(OSError):
                status = os.lstat(self.path)
                if (status.st_dev, status.st_ino) == self._identity:
                    os.unlink(self.path)
            self._identity = None
        self._sock.close()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock the directory, so that two engines that find a stale socket do not replace each other's. This
    leaves no lock file behind."""
    with Descriptor(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield


def _make_room(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise _taken(f"{path}: exists and is not a socket")
    # Connecting a datagram socket fails with EPROTOTYPE if the stream socket is in use. Its owner does not
    # notice, whereas it would accept a stream connection as its peer. A stale socket gives ECONNREFUSED.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(os.fspath(path)) != errno.ECONNREFUSED:
            raise _taken(f"{path}: another process is listening there")
    os.unlink(path)


def _taken(text: str) -> UnsupportedError:
    error = UnsupportedError(text)
    error.errno = errno.EADDRINUSE
    return error
