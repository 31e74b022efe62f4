"""A sink that writes to a Python file object."""

from __future__ import annotations

from typing import BinaryIO

from snapengine.storage.sink import Sink, sink_error


class PyFileSink(Sink):
    """Writes to a binary file object of the caller. It is flushed on commit, but not closed."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(str(getattr(file, "name", type(file).__name__)))
        self._file = file

    def write(self, data: memoryview | bytes) -> None:
        """Write all of `data`; a raw file may need several calls."""
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
