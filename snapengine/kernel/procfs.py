"""Text files of /proc: only a line feed ends a line, and names in them are bytes.

Python's text mode also ends a line at a carriage return, and `str.splitlines` at six more characters. The
kernel does not escape them in the name of a thread or file, so a name could imitate a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from snapengine.base.names import decode


def read(path: str | os.PathLike[str]) -> str:
    """The whole file. Raises OSError."""
    with open(path, "rb") as file:
        return decode(file.read())


def lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """The lines without their line feeds, read one by one. Raises OSError."""
    with open(path, "rb") as file:
        for line in file:
            yield decode(line.removesuffix(b"\n"))


def status(path: str | os.PathLike[str]) -> dict[str, str]:
    """The fields of a status file: name and value. Raises OSError."""
    pairs = (line.partition(":") for line in lines(path))
    return {name: value.strip() for name, _, value in pairs}
