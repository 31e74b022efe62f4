"""What the parsers of an image need of where it comes from: a name, bytes, and errors that say both."""

from __future__ import annotations

from typing import Protocol

from snapengine.errors import CorruptImageError, TruncatedImageError


class Named(Protocol):
    """Anything with a name for messages."""

    @property
    def name(self) -> str:
        """The image's name."""


class Input(Named, Protocol):
    """A `Source` (any offset), or a `StreamSource` (ascending offsets only)."""

    def take(self, offset: int, count: int, /) -> bytes:
        """Exactly `count` bytes at `offset`, or `TruncatedImageError`."""


def corrupt(where: Named, text: str, offset: int | None = None) -> CorruptImageError:
    """The error to raise; `offset` is that of the record at fault."""
    return CorruptImageError(f"{where.name}: {text}", offset)


def truncated(where: Named, text: str, offset: int | None = None) -> TruncatedImageError:
    """The error to raise; `offset` is that of the record at fault."""
    return TruncatedImageError(f"{where.name}: {text}", offset)
