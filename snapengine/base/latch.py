"""Interrupt-safe waiting: an exception of a signal handler in a waiter leaves no lock held.

A signal handler may raise between any two steps of Python code. `threading.Condition`, and with it `Event`,
acquires its lock in Python code. An exception there leaves the lock held, and the next thread that needs it
waits for ever. The primitives used here are C calls, each of which takes effect completely or not at all.
"""

from __future__ import annotations

import contextlib
import time
from _queue import Empty, SimpleQueue

POLL_SECONDS = 0.2  # a notification can be lost with an interrupted waiter; the others then poll


class Wakeup:
    """Each `notify` wakes one waiter. Any thread may call any method."""

    def __init__(self) -> None:
        self._tokens: SimpleQueue[None] = SimpleQueue()

    def notify(self) -> None:
        """Wake one waiter."""
        self._tokens.put(None)

    def wait(self, seconds: float) -> None:
        """Wait for a notification, for at most `seconds`."""
        with contextlib.suppress(Empty):
            self._tokens.get(timeout=max(seconds, 0.0))


class Latch:
    """Initially closed; once open, it stays open. Any thread may call any method."""

    def __init__(self) -> None:
        self._open = False
        self._wakeup = Wakeup()

    def set(self) -> None:
        """Open the latch."""
        self._open = True
        self._wakeup.notify()

    def is_set(self) -> bool:
        """Whether it is open."""
        return self._open

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the latch is open. Returns False after `timeout` seconds."""
        until = None if timeout is None else time.monotonic() + timeout
        while not self._open:
            left = POLL_SECONDS if until is None else min(until - time.monotonic(), POLL_SECONDS)
            if left <= 0:
                return self._open
            self._wakeup.wait(left)
        self._wakeup.notify()  # wake the next waiter
        return True
