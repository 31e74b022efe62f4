"""Threads that work on parts which are freed when none of them does any more.

`_thread.start_new_thread` starts them, which is one call of C: the handler of a signal raises before it or
behind it. `threading.Thread.start` is Python code that waits with a Condition: an exception in its middle
leaves a thread that hangs before it does anything, or one that is listed as starting, for ever.

Behind the call an exception comes before the caller has counted the thread, so no count of started threads is
complete. Each signs on by itself instead; once the crew is dismissed none does, and touches nothing.

All fields but `_started`, which is the starter's alone, are written under the lock. That is a lock of C's:
see `snapengine.base.latch` for why there is no Condition.
"""

from __future__ import annotations

import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable
from typing import Any

from snapengine.base.latch import LOOK_SECONDS, Bell, Latch
from snapengine.base.threadname import name_thread

Job = tuple[Callable[..., Any], tuple[object, ...]]


class Crew:
    """Threads, started by one thread, that count themselves. All methods but `start` may be called by any.

    The interpreter does not wait for them when it exits. What one raises goes to `threading.excepthook`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends = Bell()
        self._started = 0
        self._begun = 0
        self._working = 0
        self._dismissed = False

    @property
    def working(self) -> int:
        """How many work at the moment."""
        return self._working

    def start(self, name: str, work: Callable[..., Any], *arguments: object) -> None:
        """Start a thread that calls ``work(*arguments)``, unless the crew is dismissed by then. It has begun
        when this returns: the memory that Python maps for a new thread is not mapped later, into a hole that
        the caller makes in memory of its own.

        `name`: what the kernel shows (of its bytes the first 15). RuntimeError: there are too many threads.
        """
        there = Latch()
        start_new_thread(self._run, (name, [(work, arguments)], there))
        self._started += 1
        there.wait()

    def _run(self, name: str, job: list[Job], there: Latch) -> None:
        """A thread's body. CPython keeps the arguments until the thread has ended: of `job` the list only."""
        there.set()
        name_thread(name)
        with self._lock:
            if self._dismissed:
                return
            self._begun += 1
            self._working += 1
        try:
            _do(*job.pop())
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
        these threads touches, or keeps alive, what it was given. The kernel may list it for a moment more.

        False if `timeout` seconds passed.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._ended():
            left = LOOK_SECONDS if until is None else min(until - time.monotonic(), LOOK_SECONDS)
            if left <= 0:
                return False
            self._ends.listen(left)
        return True

    def _ended(self) -> bool:
        with self._lock:
            return not self._working and (self._dismissed or self._begun >= self._started)


def _do(work: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    """As `threading.Thread.run` is called: under a debugger or a profiler, if there is one."""
    sys.settrace(threading.gettrace())
    sys.setprofile(threading.getprofile())
    try:
        work(*arguments)
    except BaseException:
        threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), None]))
    finally:
        # Who asked for threading.current_thread(), as `logging` does, has left a record of this thread there,
        # which up to Python 3.12 stays for ever.
        getattr(threading, "_active", {}).pop(threading.get_ident(), None)
