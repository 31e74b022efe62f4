"""The captures that hold memory protected: what becomes of them when the process exits or forks."""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol

CANCEL_SECONDS = 10.0


class Live(Protocol):
    """What is asked of a capture here."""

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""

    def cancel(self) -> None:
        """Begin to release the target."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is released."""

    def drop_in_child(self) -> None:
        """In a forked child: let go of what is the parent's."""


live: weakref.WeakSet[Live] = weakref.WeakSet()


def wait_for_cancelled() -> None:
    """A capture that was cancelled a moment ago may still have its memory registered; it releases it soon."""
    for capture in list(live):
        if capture.cancelled:
            capture.wait(CANCEL_SECONDS)


def _cancel_all() -> None:
    """At interpreter exit: the threads are daemons, so that this runs before anybody waits for them."""
    for capture in list(live):
        capture.cancel()
        capture.wait(CANCEL_SECONDS)


def _drop_in_child() -> None:
    """A forked child must not keep the parent's userfaultfd open: the kernel releases a target when the last
    copy is closed, and that must be when the parent dies. The child has no capture threads to wait for."""
    for capture in list(live):
        capture.drop_in_child()
    live.clear()


atexit.register(_cancel_all)
os.register_at_fork(after_in_child=_drop_in_child)
