"""Threads that work on parts which are freed when none of them does any more.

An exception may be raised in the middle of Thread.start(), or just behind it: a Ctrl-C's. Then the thread
runs, or is about to, and neither the caller nor the Thread tells which, so no list of started threads is
complete. Each signs on by itself instead; once the crew is dismissed none does, and touches nothing.

All fields but `_started`, which is the starter's alone, are written under the lock. That is a lock of C's:
see
`snapengine.latch` for why there is no Condition.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from snapengine.latch import LOOK_SECONDS, Bell


class Crew:
    """Threads, started by one thread, that count themselves. All methods but `start` may be called by any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends = Bell()
        self._started = 0
        self._begun = 0
        self._working = 0
        self._dismissed = False
        self._threads: list[threading.Thread] = []  # those that signed on, until they are joined

    @property
    def working(self) -> int:
        """How many work at the moment."""
        return self._working

    def start(self, name: str, work: Callable[..., None], *arguments: object) -> None:
        """Start a daemon thread that calls ``work(*arguments)``, unless the crew is dismissed by then."""
        threading.Thread(target=self._run, args=(work, arguments), name=name, daemon=True).start()
        self._started += 1

    def _run(self, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
        with self._lock:
            if self._dismissed:
                return
            self._begun += 1
            self._working += 1
            self._threads.append(threading.current_thread())
        try:
            work(*arguments)
        finally:
            with self._lock:
                self._working -= 1
            self._ends.ring()

    def dismiss(self) -> bool:
        """Let no thread begin any more. Returns whether any has."""
        with self._lock:
            self._dismissed = True
            return self._begun > 0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all that were started have ended, or after `dismiss` those that had begun; then none of
        these threads is left.

        False if `timeout` seconds passed.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._ended():
            left = LOOK_SECONDS if until is None else min(until - time.monotonic(), LOOK_SECONDS)
            if left <= 0:
                return False
            self._ends.listen(left)
        with self._lock:
            threads, self._threads = self._threads, []
        for thread in threads:  # nothing of ours is left to be done: it ends at once
            thread.join()
        return True

    def _ended(self) -> bool:
        with self._lock:
            return not self._working and (self._dismissed or self._begun >= self._started)
