"""The entry of the command `snapengine`.

It imports next to nothing: from its first line on a signal ends the command without a traceback, and each
command imports only what it needs (a machine of QEMU may be standing until `ingest` reads).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from snapengine.cli.signals import catch, end_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (`cli.common.EXIT_CODES`). Usage errors raise SystemExit(2).

    Without `argv` this process is the command: signals that come once it is done do not change its exit code.
    """
    before = catch(end_at_once)
    after = signal.SIG_IGN if argv is None else None
    try:
        arguments = list(sys.argv[1:] if argv is None else argv)
        from snapengine.cli.command import run_command

        return run_command(arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if after is None else after)
