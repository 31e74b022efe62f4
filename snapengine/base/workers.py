"""Worker threads that can be waited for reliably, even if a signal handler raises while they are started.

The threads use resources that are freed after the last of them has ended. `_thread.start_new_thread` starts
them. It is one C call, so a signal handler raises before or after it. `threading.Thread.start` is Python code
that waits on a Condition: an exception in the middle of it leaves a thread that hangs at its start, or one
that is listed as starting for ever.

A signal handler may also raise after the call, before the caller has counted the thread. A count of started
threads is therefore unreliable, and each thread registers itself. After `close` no thread registers, and a
thread that has not registered accesses nothing.

The lock protects all fields except `_n_started`, which only the starting thread accesses. It is implemented
in C; `snapengine.base.latch` explains why no Condition is used.
"""

from __future__ import annotations

import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable
from typing import Any

from snapengine.base.latch import POLL_SECONDS, Latch, Wakeup
from snapengine.base.threadname import name_thread

Job = tuple[Callable[..., Any], tuple[object, ...]]


class Workers:
    """A group of threads that register themselves. One thread calls `start`; any thread may call the rest.

    The interpreter does not wait for them at exit. `threading.excepthook` gets their exceptions.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends = Wakeup()
        self._n_started = 0
        self._n_begun = 0
        self._n_working = 0
        self._closed = False

    @property
    def working(self) -> int:
        """Number of threads that are working now."""
        return self._n_working

    def start(self, name: str, work: Callable[..., Any], *arguments: object) -> None:
        """Start a thread that calls ``work(*arguments)``, unless the group is closed by then.

        Returns when the thread runs: Python then maps no more memory for it, which could otherwise fill a
        hole that the caller creates in its own memory. `name` is the kernel's name of the thread, truncated
        to 15 bytes. Raises RuntimeError if there are too many threads.
        """
        begun = Latch()
        start_new_thread(self._run, (name, [(work, arguments)], begun))
        self._n_started += 1
        begun.wait()

    def _run(self, name: str, job: list[Job], begun: Latch) -> None:
        """Body of a thread. CPython keeps its arguments until it has ended; the list `job` is emptied."""
        begun.set()
        name_thread(name)
        with self._lock:
            if self._closed:
                return
            self._n_begun += 1
            self._n_working += 1
        try:
            _do(*job.pop())
        finally:
            with self._lock:
                self._n_working -= 1
            self._ends.notify()

    def close(self) -> bool:
        """Let no further thread begin to work. Returns whether any has begun."""
        with self._lock:
            self._closed = True
            return self._n_begun > 0

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all started threads have ended; after `close`, those that had begun. They then neither
        access nor reference their arguments, though the kernel may list them a moment longer.

        Returns False after `timeout` seconds.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._ended():
            left = POLL_SECONDS if until is None else min(until - time.monotonic(), POLL_SECONDS)
            if left <= 0:
                return False
            self._ends.wait(left)
        return True

    def _ended(self) -> bool:
        with self._lock:
            return not self._n_working and (self._closed or self._n_begun >= self._n_started)


def _do(work: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    """Call `work` as `threading.Thread` does: with the debugger's trace and profile functions, if set."""
    sys.settrace(threading.gettrace())
    sys.setprofile(threading.getprofile())
    try:
        work(*arguments)
    except BaseException:
        threading.excepthook(threading.ExceptHookArgs([*sys.exc_info(), None]))
    finally:
        # threading.current_thread(), which `logging` calls, creates a record of this thread that Python up to
        # 3.12 never removes.
        getattr(threading, "_active", {}).pop(threading.get_ident(), None)
