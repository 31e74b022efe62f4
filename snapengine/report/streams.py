"""Standard output and error of the command, which may be closed, broken, full, or of an ASCII locale.

Imports almost nothing: every command starts here.
"""

from __future__ import annotations

import codecs
import os
import select
import sys
from typing import TextIO

PLAIN = {
    "µ": "u", "\u202f": " ", "÷": "/", "→": "->",
}  # fmt: skip
"""Replacements for characters that the output's encoding lacks."""
ERRORS = "snapengine.plain"
closed: set[int] = set()
"""Standard descriptors that were closed when the command began: output to them is lost."""


def prepare() -> None:
    """Make printing to both streams safe: both exist, and every character can be encoded.

    A file opened later would get the number of a closed standard descriptor, and messages would go into it.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        closed.add(fd)
    os.close(fd)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    codecs.register_error(ERRORS, _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a test may have put another object there
        if reconfigure is not None:
            reconfigure(errors=ERRORS)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or ascii(c)[1:-1] for c in bad), error.end


def is_broken(stream: TextIO) -> bool:
    """Whether it is a pipe or socket without a reader."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def silence(stream: TextIO) -> None:
    """Redirect a broken stream to /dev/null, so that the interpreter's flush at exit does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
