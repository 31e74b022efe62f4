"""A sink that keeps the image in memory."""

from __future__ import annotations

from snapengine.storage.sink import Sink


class MemorySink(Sink):
    """Keeps the image in memory; `getvalue` returns it after `commit`."""

    def __init__(self) -> None:
        super().__init__("memory")
        self._bytes = bytearray()

    def write(self, data: memoryview | bytes) -> None:
        """Append `data`."""
        self._bytes += data

    def getvalue(self) -> bytes:
        """The bytes written so far; empty after `abort`."""
        return bytes(self._bytes)

    def _abort(self) -> None:
        self._bytes.clear()
