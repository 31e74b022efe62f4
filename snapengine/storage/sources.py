"""Where the bytes of an image come from: a file at any offset, or a stream front to back."""

from __future__ import annotations

import os
from typing import BinaryIO, Protocol

from snapengine.errors import CorruptImageError, TruncatedImageError


class Named(Protocol):
    """Anything with a name for messages."""

    @property
    def name(self) -> str:
        """The image's name."""


def corrupt(where: Named, text: str, offset: int | None = None) -> CorruptImageError:
    """The error to raise; `offset` is that of the record at fault."""
    return CorruptImageError(f"{where.name}: {text}", offset)


def truncated(where: Named, text: str, offset: int | None = None) -> TruncatedImageError:
    """The error to raise; `offset` is that of the record at fault."""
    return TruncatedImageError(f"{where.name}: {text}", offset)


class Source(Named, Protocol):
    """Where bytes come from: a file (any offset) or a stream (ascending offsets only)."""

    def take(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset`, or `TruncatedImageError`."""


class FileSource:
    """A regular file, by pread. Does not own `fd`."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.size = os.fstat(fd).st_size

    def take(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset`, or `TruncatedImageError` before anything is allocated."""
        if offset + count > self.size:
            raise TruncatedImageError(f"{self.name}: ends at byte {self.size}, inside of a record", offset)
        parts: list[bytes] = []
        while count:
            part = os.pread(self.fd, count, offset)
            if not part:
                raise TruncatedImageError(f"{self.name}: became shorter while it was read", offset)
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class StreamSource:
    """A readable file object that cannot seek."""

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
