"""Standard output and error of the command, whatever they are: closed, of an ASCII locale, broken, full.

Imports next to nothing: every command begins here.
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
"""What stands for a character of ours that an output's encoding lacks."""
ERRORS = "snapengine.plain"
closed: set[int] = set()
"""Standard descriptors that were closed when the command began: nothing that is written to them is kept."""


def prepare() -> None:
    """Make printing to both streams safe: no character can fail, and both are there.

    Where a standard descriptor is closed, an image would get its number, and words would go into it.
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
    """Whether it is a pipe or socket that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def silence(stream: TextIO) -> None:
    """It cannot be written to: keep the interpreter from failing once more when it flushes it at the end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
