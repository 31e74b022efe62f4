"""The command `snapengine`: parsing, errors and exit codes. Each subcommand is in a cli_*.py of its own.

Data goes to stdout, words go to stderr. An error is one line; SNAPENGINE_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence

from snapengine import __version__, cli_image, cli_ingest, cli_qemu, cli_save, cli_tools
from snapengine.cli_common import (
    EXIT_CODES,
    EXIT_ERROR,
    EXIT_PIPE,
    Interrupted,
    interruptible,
    raw,
    silence_stdout,
)
from snapengine.errors import SnapengineError
from snapengine.names import one_line

DESCRIPTION = """\
Live snapshots of memory: the state at one instant, saved while the program goes on writing.
"""
EPILOG = f"""\
`snapengine COMMAND --help` has the options and examples of each command.

{EXIT_CODES}

environment:
  SNAPENGINE_DEBUG=1  print the traceback of an error, too
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `args.run(args)` of what it returns does the work."""
    parser = argparse.ArgumentParser(
        prog="snapengine", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    parser.add_argument("--version", action="version", version=f"snapengine {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    cli_save.add_parser(commands)
    cli_ingest.add_parser(commands)
    cli_image.add_parsers(commands)
    cli_qemu.add_parser(commands)
    cli_tools.add_parsers(commands)
    return parser


def describe(error: BaseException) -> str:
    """An error as one line that names the thing and the reason."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without Python's "[Errno 2]"
        text = error.strerror
        if error.filename is not None and str(error.filename) not in text:
            text = f"{error.filename}: {text}"
    elif not isinstance(error, SnapengineError | OSError | ValueError):
        text = f"internal: {type(error).__name__}: {text} (SNAPENGINE_DEBUG=1 shows where)"
    return one_line(text) or type(error).__name__


def fail(error: Exception) -> int:
    """Report `error`; returns the exit code."""
    if os.environ.get("SNAPENGINE_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"snapengine: error: {describe(error)}", file=sys.stderr)
    return EXIT_ERROR


def stdout_is_broken() -> bool:
    """Whether stdout is a pipe or socket that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (see `EXIT_CODES`). Usage errors raise SystemExit(2)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with interruptible():
            if arguments[:1] == ["guest"]:  # has a parser of its own
                from snapengine import guest

                code = guest.main(arguments[1:])
            else:
                args = make_parser().parse_args(arguments)
                code = args.run(args)
            sys.stdout.flush()
            return int(code or 0)
    except Interrupted as stop:
        print(f"snapengine: {stop}", file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and stdout_is_broken():
            silence_stdout()
            return EXIT_PIPE
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
