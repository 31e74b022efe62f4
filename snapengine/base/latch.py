"""Waiting in Python so that an interrupt in the middle of it harms nobody.

The handler of a signal raises between any two steps of Python code. `threading.Condition`, and with it
`Event`, takes its lock in Python code: an exception there leaves the lock taken for ever, and whoever needs
it next waits for ever. What is used here is written in C, and takes effect as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import time
from _queue import Empty, SimpleQueue

LOOK_SECONDS = 0.2  # a waiter that another one, interrupted, has not told looks itself


class Bell:
    """Wakes one waiter for each ring. Any thread may call any method."""

    def __init__(self) -> None:
        self._rings: SimpleQueue[None] = SimpleQueue()

    def ring(self) -> None:
        """Wake one."""
        self._rings.put(None)

    def listen(self, seconds: float) -> None:
        """Wait for a ring, but no longer than that."""
        with contextlib.suppress(Empty):
            self._rings.get(timeout=max(seconds, 0.0))


class Latch:
    """Closed, and then open for ever. Any thread may call any method."""

    def __init__(self) -> None:
        self._open = False
        self._bell = Bell()

    def set(self) -> None:
        """Open it."""
        self._open = True
        self._bell.ring()

    def is_set(self) -> bool:
        """Whether it is open."""
        return self._open

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is open; False if `timeout` seconds passed."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._open:
            left = LOOK_SECONDS if until is None else min(until - time.monotonic(), LOOK_SECONDS)
            if left <= 0:
                return self._open
            self._bell.listen(left)
        self._bell.ring()  # for the next who waits
        return True
