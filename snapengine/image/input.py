"""The input interface of the image parsers: name, bytes, and errors with name and offset."""

from __future__ import annotations

from typing import Protocol

from snapengine.errors import CorruptImageError, TruncatedImageError


class Named(Protocol):
    """An object with a name for messages."""

    @property
    def name(self) -> str:
        """The image's name."""


class Input(Named, Protocol):
    """A `Source` (any offset) or a `StreamSource` (sequential)."""

    def read_exactly(self, offset: int, count: int, /) -> bytes:
        """Exactly `count` bytes at `offset`. Raises `TruncatedImageError`."""


def corrupt(where: Named, text: str, offset: int | None = None) -> CorruptImageError:
    """The error to raise; `offset` is the offset of the damaged record."""
    return CorruptImageError(f"{where.name}: {text}", offset)


def truncated(where: Named, text: str, offset: int | None = None) -> TruncatedImageError:
    """The error to raise; `offset` is the offset of the damaged record."""
    return TruncatedImageError(f"{where.name}: {text}", offset)
