r"""Names that come from the kernel or the user (paths, threads, arguments, regions): they are bytes.

One rule, in four places:

- *inside* a name is text, decoded from UTF-8 with surrogateescape (PEP 383), so no byte is lost: `decode`;
- *in an image and towards the kernel* it is its bytes again: `encode`;
- *in JSON* it is plain Unicode with two escapes, which every JSON parser reads: `escape`, `unescape`;
- *on a terminal* nothing in it can control the terminal: `printable`, and `one_line` for a whole message.
"""

from __future__ import annotations

import os
import re

_ESCAPES = re.compile(rb"\\(\\|x[89a-f][0-9a-f]|)")


def decode(data: bytes) -> str:
    """A name from its bytes."""
    return data.decode("utf-8", "surrogateescape")


def encode(name: str) -> bytes:
    """The bytes of a name. ``ValueError``: it has a surrogate that stands for no byte."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ValueError(f"the name {name[:80]!r} has a lone surrogate, which stands for no byte") from None


def from_argument(text: str) -> str:
    """A name out of ``sys.argv``, which Python decodes by the locale's encoding."""
    return decode(os.fsencode(text))


def escape(name: str) -> str:
    r"""A name in plain Unicode: ``\\`` is a backslash, ``\xHH`` a byte that is not part of valid UTF-8."""
    if name.isascii() and "\\" not in name:  # nearly every name, and a process may have 65 000 mappings
        return name
    return encode(name.replace("\\", "\\\\")).decode("utf-8", "backslashreplace")


def unescape(text: str) -> str:
    """What `escape` was given. ``ValueError``: an unknown escape, a lone surrogate, or a NUL."""
    data = _ESCAPES.sub(_replace, text.encode())
    if b"\0" in data:
        raise ValueError("a name holds a NUL")
    return decode(data)


def _replace(match: re.Match[bytes]) -> bytes:
    if not match[1]:
        raise ValueError("a name holds an unknown escape")
    return b"\\" if match[1] == b"\\" else bytes([int(match[1][1:], 16)])


def printable(name: str) -> str:
    """A name for a terminal: escaped, and without a control character that the terminal would obey."""
    return without_controls(name.replace("\\", "\\\\"))


def without_controls(text: str) -> str:
    r"""Text that a terminal can be given: what is not printable becomes an escape such as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _hexadecimal(c) for c in text)


def _hexadecimal(character: str) -> str:
    """A surrogate that stands for a byte is shown as that byte."""
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(character)[1:-1]


def one_line(text: str) -> str:
    """A message as one line that a terminal can be given; white space of all kinds becomes one space."""
    return without_controls(" ".join(text.split()))
