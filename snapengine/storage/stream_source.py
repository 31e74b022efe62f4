"""A sequential source: the bytes of an image from a pipe."""

from __future__ import annotations

from typing import BinaryIO

from snapengine.errors import CorruptImageError, TruncatedImageError


class StreamSource:
    """A readable file object that cannot seek. It remains the caller's. Not thread-safe."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.name = str(getattr(file, "name", "stream"))
        self.position = 0

    def read_exactly(self, offset: int, count: int) -> bytes:
        """The next `count` bytes. `offset` must be the current position."""
        if offset != self.position:
            text = f"{self.name}: a reference to byte {offset} of a stream, which cannot seek"
            raise CorruptImageError(text, self.position)
        data = bytearray()
        while len(data) < count:
            part = self._file.read(count - len(data))
            if not part:
                raise TruncatedImageError(f"{self.name}: ends inside a record", offset)
            data += part
        self.position += count
        return bytes(data)

    def at_end(self) -> bool:
        """Whether the stream has ended."""
        return not self._file.read(1)
