"""The entry of the command `snapengine`.

It imports almost nothing, so that a signal ends the command without a traceback from the first line on. Each
command imports only what it needs: a QEMU machine may be stopped until `ingest` reads.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from snapengine.cli.signals import catch, end_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (`cli.common.EXIT_CODES`). Usage errors raise SystemExit(2).

    Without `argv` this process is the command: signals that arrive after its end do not change the exit code.
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
