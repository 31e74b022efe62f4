"""The entry of the command `snapengine`.

It imports next to nothing: from its first line on a signal ends the command without a traceback, and each
command imports only what it needs (a machine of QEMU may be standing until `ingest` reads).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

TYPE_CHECKING = False  # type checkers know the name; `typing` would take longer than all else here

if TYPE_CHECKING:
    from types import FrameType
    from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (`cli.common.EXIT_CODES`). Usage errors raise SystemExit(2).

    Without `argv` this process is the command: signals that come once it is done do not change its exit code.
    """
    before = _catch(_end_at_once)
    after = signal.SIG_IGN if argv is None else None
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        from snapengine.cli_main import run_command

        return run_command(arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if after is None else after)


def _catch(handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Set the handler of our signals that are not ignored (nohup, a shell's background job); those before."""
    before: dict[int, Any] = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread, where Python allows no handlers
        pass
    return before


def _end_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    """Nothing has begun: nothing is to be undone."""
    os.write(2, f"snapengine: cancelled by {signal.Signals(signum).name}\n".encode())
    os._exit(128 + signum)
