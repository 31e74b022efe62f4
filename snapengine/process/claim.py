"""One capture of a process at a time, also where the kernel cannot tell who tracks its memory.

A process may have a userfaultfd of its own, so that a mapping which is taken says nothing about who took it.
A name in the abstract namespace of Unix sockets does: one has it, until its descriptor is closed. (Engines in
different network namespaces do not see each other; the kernel lets a mapping be tracked only once anyway.)
"""

from __future__ import annotations

import errno
import os
import socket
import weakref

from snapengine.errors import AlreadyTrackedError, TargetGoneError
from snapengine.kernel import procfs

_claims: weakref.WeakSet[Claim] = weakref.WeakSet()


class Claim:
    """Held until it is released. ``AlreadyTrackedError``: somebody else has it; `TargetGoneError`."""

    def __init__(self, pid: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        _claims.add(self)
        try:
            self._socket.bind(f"\0snapengine:{pid}:{_started(pid)}")
        except OSError as error:
            self._socket.close()
            if error.errno != errno.EADDRINUSE:
                raise
            text = f"process {pid} is already being tracked by another capture"
            raise AlreadyTrackedError(errno.EBUSY, text) from None

    def release(self) -> None:
        """Idempotent."""
        self._socket.close()


def _started(pid: int) -> str:
    """When the process was started: its number may be another one's later."""
    try:
        return procfs.read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(errno.ESRCH, f"process {pid} has ended") from None


def _release_in_child() -> None:
    for claim in list(_claims):
        claim.release()


os.register_at_fork(after_in_child=_release_in_child)
