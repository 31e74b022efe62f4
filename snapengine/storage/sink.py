"""What all sinks share. A sink takes bytes and knows nothing of records; a writer knows nothing of files.

Life cycle of every sink: bytes go in (through `fd` without the GIL, or `write`), then exactly one of
`commit` and `abort` takes effect; calling either again does nothing. Until `commit` has returned
there is no image.
"""

from __future__ import annotations

import errno
import os
import select

from snapengine.errors import SinkError

DISCARD = -1
PYTHON_LEVEL = -2


class Sink:
    """What all sinks share. ``fd`` is a descriptor to write to, `DISCARD`, or `PYTHON_LEVEL`."""

    name: str
    fd: int = PYTHON_LEVEL

    def __init__(self, name: str) -> None:
        self.name = name
        self._open = True

    def write(self, data: memoryview | bytes) -> None:
        """All of `data` (a sink without a descriptor). ``OSError`` if it cannot be taken."""
        raise NotImplementedError

    def explain(self, err: int) -> str:
        """What the errno of a failed write means here, in one line."""
        return os.strerror(err)

    def commit(self) -> None:
        """Make the image complete and durable. ``SinkError``: it is not, and nothing is left of it."""
        if self._open:
            self._open = False
            self._commit()

    def abort(self) -> None:
        """Leave nothing of the image behind."""
        if self._open:
            self._open = False
            self._abort()

    def cancel(self) -> None:
        """From any thread: a `commit` that waits for another process fails; any other goes on. `abort` is to
        follow."""

    def _commit(self) -> None:
        pass

    def _abort(self) -> None:
        pass


class OwnSink(Sink):
    """A sink with a descriptor of its own. When the object is freed before `commit` or `abort`, it aborts: an
    interrupt may come as the call that made it returns, and then no caller can. A forked child's copy does
    nothing."""

    _owner = 0

    def _own(self) -> None:
        """There is something to abort from now on."""
        self._owner = os.getpid()

    def __del__(self) -> None:
        if self._owner == os.getpid():
            self.abort()


def put(sink: Sink, data: bytes | bytearray | memoryview) -> None:
    """All of `data` behind what the sink has got so far. Raises OSError."""
    view = memoryview(data)
    if sink.fd == PYTHON_LEVEL:
        sink.write(view)
    while sink.fd >= 0 and view:
        try:
            view = view[os.write(sink.fd, view) :]
        except BlockingIOError:  # a pipe of ours that is full
            select.select([], [sink.fd], [])
        except OSError as error:
            number = error.errno or errno.EIO
            raise SinkError(number, f"{sink.name}: {sink.explain(number)}") from None


def sink_error(name: str, error: OSError) -> SinkError:
    """The error to raise for what the system said."""
    return SinkError(error.errno or errno.EIO, f"{name}: {error.strerror or error}")
