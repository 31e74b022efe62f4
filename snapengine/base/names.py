r"""Names from the kernel or the user (paths, threads, arguments, regions) are bytes. Representations:

- *in the program*: text, decoded from UTF-8 with surrogateescape (PEP 383), which loses no byte: `decode`;
- *in an image and for the kernel*: the original bytes: `encode`;
- *in JSON*: valid Unicode with two escapes, which every JSON parser reads: `escape`, `unescape`;
- *on a terminal*: text without control characters: `printable`, and `one_line` for a whole message.
"""

from __future__ import annotations

import os
import re

_ESCAPES = re.compile(rb"\\(\\|x[89a-f][0-9a-f]|)")


def decode(data: bytes) -> str:
    """The name for some bytes."""
    return data.decode("utf-8", "surrogateescape")


def encode(name: str) -> bytes:
    """The bytes of a name. Raises ValueError if it has a surrogate that represents no byte."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"the name {name[:80]!r} has a lone surrogate, which represents no byte") from None


def from_argument(text: str) -> str:
    """A name from ``sys.argv``, which Python decodes with the encoding of the locale."""
    return decode(os.fsencode(text))


def escape(name: str) -> str:
    r"""A name in valid Unicode: ``\\`` is a backslash, ``\xHH`` a byte that is not part of valid UTF-8."""
    if name.isascii() and "\\" not in name:  # fast path: a process may have 65 000 mappings
        return name
    return encode(name.replace("\\", "\\\\")).decode("utf-8", "backslashreplace")


def unescape(text: str) -> str:
    """The inverse of `escape`. Raises ValueError for an unknown escape, a lone surrogate, or a NUL."""
    data = _ESCAPES.sub(_replace, text.encode())
    if b"\0" in data:
        raise ValueError("a name contains a NUL")
    return decode(data)


def _replace(match: re.Match[bytes]) -> bytes:
    if not match[1]:
        raise ValueError("a name contains an unknown escape")
    return b"\\" if match[1] == b"\\" else bytes([int(match[1][1:], 16)])


def printable(name: str) -> str:
    """A name for a terminal: escaped, without control characters."""
    return without_controls(name.replace("\\", "\\\\"))


def without_controls(text: str) -> str:
    r"""Text for a terminal: non-printable characters are replaced by escapes such as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _hexadecimal(c) for c in text)


def _hexadecimal(character: str) -> str:
    """The escape of a character. A surrogate that represents a byte gets the escape of the byte."""
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(character)[1:-1]


def one_line(text: str) -> str:
    """A message as one line for a terminal. Each run of white space becomes one space."""
    return without_controls(" ".join(text.split()))
