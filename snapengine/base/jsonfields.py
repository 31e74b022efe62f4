"""Access to the members of an untrusted JSON object, with checks of type and range."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn, Self

from snapengine.base.names import unescape

MAX_VALUES = 1 << 22  # values in one document; each takes some 100 bytes when parsed
MAX_DEPTH = 32  # limits the recursion of code that prints the document


def parse_object(blob: bytes) -> Fields:
    """Parse `blob`, which must be one JSON object in ASCII. Raises ValueError if it is not.

    Strings must be encodable as UTF-8. NaN and Infinity, which are not JSON, are rejected.
    """
    if sum(map(blob.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError("it has too many values")
    try:
        text = blob.decode("ascii")
        value = json.loads(text, parse_constant=_no_constant, parse_float=_number)
        if _depth(value) > MAX_DEPTH:
            raise ValueError("too deep")
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails for a lone surrogate
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON in ASCII") from None
    return Fields(value, "it")


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _depth(value: Any) -> int:
    """Nesting depth of lists and objects, computed without recursion."""
    depth = 0
    level = [value]
    while level and depth <= MAX_DEPTH:
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [one for item in inner for one in (item.values() if isinstance(item, dict) else item)]
        depth += 1
    return depth


class Fields:
    """One JSON object. ``what`` names it in errors. Each method raises `error_type`."""

    error_type: type[Exception] = ValueError

    def __init__(self, value: Any, what: str) -> None:
        if type(value) is not dict:
            raise self.error_type(f"{what} is not a JSON object")
        self.members: dict[str, Any] = value
        self._what = what

    def has(self, key: str) -> bool:
        """Whether the member exists."""
        return key in self.members

    def _take(self, key: str, wanted: type) -> Any:
        value = self.members.get(key)
        if type(value) is not wanted:
            raise self.error_type(f"{self._what} has no valid {key!r}")
        return value

    def number(self, key: str, bits: int) -> int:
        """An integer in [0, 2^bits)."""
        value: int = self._take(key, int)
        if not 0 <= value < 1 << bits:
            raise self.error_type(f"{self._what}: {key!r} is out of range")
        return value

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        """A name, unescaped. The whole name must match the pattern."""
        name = unescape(self._take(key, str))
        if pattern is not None and not pattern.fullmatch(name):
            raise self.error_type(f"{self._what}: {key!r} is malformed")
        return name

    def names(self, key: str) -> list[str]:
        """A list of names."""
        items = self._take(key, list)
        if not all(type(item) is str for item in items):
            raise self.error_type(f"{self._what}: {key!r} is not a list of strings")
        return [unescape(item) for item in items]

    def objects(self, key: str) -> list[Self]:
        """A list of objects."""
        return [type(self)(item, f"an item of {key!r}") for item in self._take(key, list)]

    def flag(self, key: str) -> bool:
        """true or false."""
        return bool(self._take(key, bool))

    def string(self, key: str) -> str:
        """A string that is not an escaped name."""
        return str(self._take(key, str))

    def strings(self, key: str) -> list[str]:
        """A list of strings that are not escaped names."""
        items: list[str] = self._take(key, list)
        if not all(type(item) is str for item in items):
            raise self.error_type(f"{self._what}: {key!r} is not a list of strings")
        return items

    def integers(self, key: str, bits: int) -> list[int]:
        """A list of integers in [0, 2^bits)."""
        items: list[int] = self._take(key, list)
        if not all(_is_number(item, bits) for item in items):
            raise self.error_type(f"{self._what}: {key!r} is not a list of numbers")
        return items

    def pairs(self, key: str, bits: int) -> list[Sequence[int]]:
        """A list of pairs of integers in [0, 2^bits)."""
        items: list[Sequence[int]] = self._take(key, list)
        for item in items:
            if type(item) is not list or len(item) != 2 or not all(_is_number(one, bits) for one in item):
                raise self.error_type(f"{self._what}: {key!r} is not a list of pairs of numbers")
        return items

    def object(self, key: str) -> Self:
        """An object."""
        return type(self)(self._take(key, dict), repr(key))

    def numbers(self, bits: int) -> None:
        """Check that all members are integers in [0, 2^bits)."""
        for key in self.members:
            self.number(key, bits)


def _is_number(value: Any, bits: int) -> bool:
    return type(value) is int and 0 <= value < 1 << bits
