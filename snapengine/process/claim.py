"""A lock that allows one capture of a process at a time.

The kernel lets one userfaultfd track a mapping, but EBUSY does not tell whether another capture or the
process itself tracks it. The lock is a name in the abstract namespace of Unix sockets, which one socket can
have until its descriptor is closed. (Engines in different network namespaces do not see each other's lock;
for them only the kernel's limit holds.)
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
    """The lock, held until `release`. `AlreadyTrackedError`: another capture holds it. `TargetGoneError`."""

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
        """Release the lock. Idempotent."""
        self._socket.close()


def _started(pid: int) -> str:
    """The start time of the process, since its pid may be reused."""
    try:
        return procfs.read(f"/proc/{pid}/stat").rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(errno.ESRCH, f"process {pid} has ended") from None


def _release_in_child() -> None:
    for claim in list(_claims):
        claim.release()


os.register_at_fork(after_in_child=_release_in_child)
