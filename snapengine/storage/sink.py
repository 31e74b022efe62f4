"""The base class of sinks. A sink knows bytes but no records; a writer knows records but no files.

Life cycle: bytes are written, to `fd` without the GIL or by `write`. Then the first call of `commit` or
`abort` takes effect; later calls do nothing. The image exists only after `commit` has returned.
"""

from __future__ import annotations

import errno
import os
import select

from snapengine.errors import SinkError

DISCARD = -1
NO_DESCRIPTOR = -2


class Sink:
    """Base class of sinks. ``fd`` is a descriptor to write to, `DISCARD`, or `NO_DESCRIPTOR`."""

    name: str
    fd: int = NO_DESCRIPTOR

    def __init__(self, name: str) -> None:
        self.name = name
        self._open = True

    def write(self, data: memoryview | bytes) -> None:
        """Write all of `data`, for a sink without a descriptor. Raises OSError."""
        raise NotImplementedError

    def explain(self, err: int) -> str:
        """One-line explanation of the errno of a failed write."""
        return os.strerror(err)

    def commit(self) -> None:
        """Make the image complete and durable. After a `SinkError` nothing of the image is left."""
        if self._open:
            self._open = False
            self._commit()

    def abort(self) -> None:
        """Discard the image."""
        if self._open:
            self._open = False
            self._abort()

    def cancel(self) -> None:
        """Make a `commit` fail that waits for another process; other commits continue. The caller calls
        `abort` afterwards. Any thread may call it."""

    def _commit(self) -> None:
        pass

    def _abort(self) -> None:
        pass


class OwningSink(Sink):
    """A sink that owns resources. If the object is freed before `commit` or `abort`, it aborts: after an
    interrupt during construction no caller has a reference to it. In a forked child it does nothing."""

    _owner = 0

    def _take_ownership(self) -> None:
        """Abort when the object is freed, from now on."""
        self._owner = os.getpid()

    def __del__(self) -> None:
        if self._owner == os.getpid():
            self.abort()


def write_all(sink: Sink, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data` to the sink. Raises OSError."""
    view = memoryview(data)
    if sink.fd == NO_DESCRIPTOR:
        sink.write(view)
    while sink.fd >= 0 and view:
        try:
            view = view[os.write(sink.fd, view) :]
        except BlockingIOError:  # a full pipe; sinks open pipes with O_NONBLOCK
            select.select([], [sink.fd], [])
        except OSError as error:
            number = error.errno or errno.EIO
            raise SinkError(number, f"{sink.name}: {sink.explain(number)}") from None


def sink_error(name: str, error: OSError) -> SinkError:
    """The `SinkError` for an OSError."""
    return SinkError(error.errno or errno.EIO, f"{name}: {error.strerror or error}")
