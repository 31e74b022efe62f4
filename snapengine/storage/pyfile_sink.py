"""An image into a Python file object."""

from __future__ import annotations

from typing import BinaryIO

from snapengine.storage.sink import Sink, sink_error


class PyFileSink(Sink):
    """A writable binary file object of the caller's: flushed on commit, never closed."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(str(getattr(file, "name", type(file).__name__)))
        self._file = file

    def write(self, data: memoryview | bytes) -> None:
        """All of `data`, however little a raw file takes at once."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            raise sink_error(self.name, error) from None

    def _commit(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise sink_error(self.name, error) from None
