"""Members of a JSON object that somebody else wrote: each with its type and range checked."""

from __future__ import annotations

import json
import re
from typing import Any

from snapengine.names import unescape

MAX_VALUES = 1 << 22  # values in one document: each costs some 100 bytes once it is parsed


def parse_object(blob: bytes) -> Fields:
    """The one JSON object in ASCII that `blob` must be. ``ValueError``: it is not."""
    if sum(map(blob.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError("it has too many values")
    try:
        value = json.loads(blob.decode("ascii"))
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON in ASCII") from None
    return Fields(value, "it")


class Fields:
    """One JSON object. ``what`` names it in the `ValueError` that each method raises."""

    def __init__(self, value: Any, what: str) -> None:
        if type(value) is not dict:
            raise ValueError(f"{what} is not a JSON object")
        self._value = value
        self._what = what

    def _take(self, key: str, wanted: type) -> Any:
        value = self._value.get(key)
        if type(value) is not wanted:
            raise ValueError(f"{self._what} has no proper {key!r}")
        return value

    def number(self, key: str, bits: int) -> int:
        """An integer in [0, 2^bits)."""
        value: int = self._take(key, int)
        if not 0 <= value < 1 << bits:
            raise ValueError(f"{self._what}: {key!r} is out of range")
        return value

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        """A name, unescaped; all of it must match the pattern."""
        name = unescape(self._take(key, str))
        if pattern is not None and not pattern.fullmatch(name):
            raise ValueError(f"{self._what}: {key!r} is malformed")
        return name

    def names(self, key: str) -> list[str]:
        """A list of names."""
        items = self._take(key, list)
        if not all(type(item) is str for item in items):
            raise ValueError(f"{self._what}: {key!r} is not a list of strings")
        return [unescape(item) for item in items]

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        return [Fields(item, f"an item of {key!r}") for item in self._take(key, list)]
