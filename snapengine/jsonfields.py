"""Members of a JSON object that somebody else wrote: each with its type and range checked.

Names that come from the kernel (paths, arguments) are bytes. In Python they are text with surrogateescape
(PEP 383), in JSON plain Unicode with two escapes, so that every JSON parser reads them: see `escape`.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_VALUES = 1 << 22  # values in one document: each costs some 100 bytes once it is parsed
_ESCAPES = re.compile(rb"\\(\\|x[89a-f][0-9a-f]|)")


def escape(name: str) -> str:
    r"""A name in plain Unicode: ``\\`` is a backslash, ``\xHH`` a byte that is not part of valid UTF-8."""
    if name.isascii() and "\\" not in name:  # nearly every name, and a process may have 65 000 mappings
        return name
    return name.replace("\\", "\\\\").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def unescape(text: str) -> str:
    """What `escape` was given. ``ValueError``: an unknown escape, a lone surrogate, or a NUL."""
    data = _ESCAPES.sub(_replace, text.encode())
    if b"\0" in data:
        raise ValueError("a name holds a NUL")
    return data.decode("utf-8", "surrogateescape")


def _replace(match: re.Match[bytes]) -> bytes:
    if not match[1]:
        raise ValueError("a name holds an unknown escape")
    return b"\\" if match[1] == b"\\" else bytes([int(match[1][1:], 16)])


def printable(name: str) -> str:
    """A name for a terminal: escaped, and without a control character that the terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in escape(name))


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
