"""Choices made by the bytes of a fuzz input, with the names that random.Random has.

So one function makes a test case of a random number generator or of a fuzzer's input, and a byte that the
fuzzer changes is one decision changed. When the bytes are used up, every choice is the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


class Draw:
    """Choices out of `data`."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def left(self) -> bool:
        """Whether there is any byte left."""
        return self._at < len(self._data)

    def randrange(self, start: int, stop: int | None = None) -> int:
        """A number in [0, start), or in [start, stop)."""
        low, high = (0, start) if stop is None else (start, stop)
        if high <= low:
            raise ValueError("an empty range")
        size = max(1, ((high - low - 1).bit_length() + 7) // 8)
        return low + int.from_bytes(self.take(size), "little") % (high - low)

    def choice(self, options: Sequence[Value]) -> Value:
        """One of them."""
        return options[self.randrange(len(options))]
