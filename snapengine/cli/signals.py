"""Signals that end a command, before its own handlers are set. Imports next to nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

TYPE_CHECKING = False  # type checkers know the name; `typing` would take longer than all else here

if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def catch(handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Set the handler of those of `SIGNALS` that are not ignored (nohup, background jobs). Returns the
    previous handlers."""
    before: dict[int, Any] = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread, where Python allows no handlers
        pass
    return before


def end_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    """Exit at once: nothing has begun that would have to be undone."""
    os.write(2, f"snapengine: cancelled by {signal.Signals(signum).name}\n".encode())
    os._exit(128 + signum)
