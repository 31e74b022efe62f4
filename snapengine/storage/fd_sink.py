"""A sink that writes to a file descriptor of the caller: a file, a pipe, a socket, a terminal."""

from __future__ import annotations

import os
import stat

from snapengine.base.descriptor import Descriptor
from snapengine.storage.sink import OwningSink, sink_error


class FdSink(OwningSink):
    """Writes to a descriptor of the caller, without closing it or changing its flags."""

    def __init__(self, fd: int, name: str | None = None) -> None:
        super().__init__(name or f"fd:{fd}")
        try:
            self._descriptor = _private_writer(fd)
        except OSError as error:
            raise sink_error(self.name, error) from None
        self.fd = self._descriptor.fd
        self._take_ownership()

    def _commit(self) -> None:
        try:
            if stat.S_ISREG(os.fstat(self.fd).st_mode):
                os.fsync(self.fd)
        except OSError as error:
            raise sink_error(self.name, error) from None
        finally:
            self._descriptor.close()

    def _abort(self) -> None:
        self._descriptor.close()


def _private_writer(fd: int) -> Descriptor:
    """A private descriptor for the same file.

    A pipe is reopened with O_NONBLOCK, so that a write to a full pipe can be cancelled. Setting the flag on
    the caller's open file description would change it for all processes that share it.
    """
    own = Descriptor.duplicate(fd)
    if not stat.S_ISFIFO(os.fstat(own.fd).st_mode):
        return own
    try:
        reopened = Descriptor(f"/proc/self/fd/{own.fd}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # no /proc, or a pipe of another user: the writer polls instead
        return own
    own.close()
    return reopened
