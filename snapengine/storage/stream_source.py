"""An image that comes through a pipe: its bytes, front to back."""

from __future__ import annotations

from typing import BinaryIO

from snapengine.errors import CorruptImageError, TruncatedImageError


class StreamSource:
    """A readable file object that cannot seek. It stays the caller's. One thread at a time."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.name = str(getattr(file, "name", "stream"))
        self.position = 0

    def take(self, offset: int, count: int) -> bytes:
        """The next `count` bytes; `offset` says where the caller thinks they are."""
        if offset != self.position:
            raise CorruptImageError(f"{self.name}: a reference to byte {offset} of a stream", self.position)
        data = bytearray()
        while len(data) < count:
            part = self._file.read(count - len(data))
            if not part:
                raise TruncatedImageError(f"{self.name}: ends inside of a record", offset)
            data += part
        self.position += count
        return bytes(data)

    def at_end(self) -> bool:
        """Whether nothing follows."""
        return not self._file.read(1)
