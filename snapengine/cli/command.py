"""Parsing, errors and exit codes of the command. Each subcommand has its module in this package.

Data goes to stdout, messages go to stderr. An error is one line; SNAPENGINE_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from snapengine import __version__
from snapengine.report import streams

if TYPE_CHECKING:
    import argparse

    from snapengine.report.terminal import Parser

COMMANDS = {
    "save": ("save", "save the memory of a running program"),
    "ingest": ("ingest", "convert a QEMU migration stream to an image"),
    "info": ("image", "show what is in an image"),
    "verify": ("image", "check every byte of an image"),
    "restore": ("restore", "extract one region as raw bytes"),
    "export": ("restore", "convert the memory to a raw file or an ELF core"),
    "qemu": ("qemu", "save, restore and analyze QEMU machines"),
    "guest": ("tools", "run the embedded guest: a program that writes to its memory"),
    "doctor": ("tools", "check what this host supports"),
    "demo": ("tools", "compare both methods on a busy guest"),
    "completion": ("completion", "print a script for the completion of a shell"),
}
"""Module and help line of each command."""

WRAPPER = ["qemu", "restore"]
"""The command that takes another command line behind --. argparse cannot: an optional positional argument
behind IMAGE takes nothing as soon as an option follows IMAGE."""

DESCRIPTION = """\
Live snapshots of memory: the state at one instant, saved while the program goes on writing.
"""


def make_parser(command: str | None = None) -> Parser:
    """The parser. `args.run(args)` of the parsed arguments does the work. With `command` the parser has the
    options of that command only, and the names of the others."""
    from snapengine.report.terminal import EXIT_CODES, Parser, raw

    epilog = (
        "`snapengine COMMAND --help` has the options and examples of each command.\n\n"
        f"{EXIT_CODES}\n\nenvironment:\n"
        "  SNAPENGINE_DEBUG=1  also print the traceback of an error\n"
    )
    parser = Parser(prog="snapengine", description=DESCRIPTION, epilog=epilog, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"snapengine {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="command")
    for name, (module, line) in COMMANDS.items():
        if command not in (None, name):
            commands.add_parser(name, help=line)
            continue
        add = getattr(import_module(f"snapengine.cli.{module}"), f"add_{name}")
        add(commands, line)
    return parser


def run_command(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    streams.prepare()
    if list(arguments) == ["--version"]:  # without argparse, in the time of a bare Python
        return _print_version()
    from snapengine.cli.common import Interrupted, interruptible

    try:
        with interruptible():
            code = _run(list(arguments))
            sys.stdout.flush()
            return code
    except Interrupted as stop:
        _complain(str(stop))
        return stop.exit_code
    except Exception as error:
        return _failed(error)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line, but not that of ``guest``. `behind` is what is behind -- of the `WRAPPER`."""
    known = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    behind: list[str] = []
    if arguments[:2] == WRAPPER and "--" in arguments:
        at = arguments.index("--")
        arguments, behind = arguments[:at], arguments[at + 1 :]
    args = make_parser(known).parse_args(arguments)
    args.behind = behind
    return args


def _run(arguments: list[str]) -> int:
    from snapengine.cli.common import limit_time

    if arguments[:1] == ["guest"]:  # it has its own parser
        from snapengine.guest import main as guest

        return guest.main(arguments[1:])
    args = parse(arguments)
    with limit_time(getattr(args, "timeout", None)):
        return int(args.run(args) or 0)


def _print_version() -> int:
    try:
        print(f"snapengine {__version__}", flush=True)
    except OSError:
        streams.silence(sys.stdout)
        return 141
    return 0


def describe(error: BaseException) -> str:
    """An error as one line that names the object and the reason."""
    from snapengine.base.names import one_line
    from snapengine.errors import SnapengineError

    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without Python's "[Errno 2]"
        text = error.strerror
        if error.filename is not None and str(error.filename) not in text:
            text = f"{error.filename}: {text}"
    elif not isinstance(error, SnapengineError | OSError | ValueError):
        text = f"internal: {type(error).__name__}: {text} (SNAPENGINE_DEBUG=1 shows where)"
    return one_line(text) or type(error).__name__


def _failed(error: Exception) -> int:
    """Report `error`; returns the exit code."""
    from snapengine.errors import TimeLimitError
    from snapengine.report.terminal import EXIT_ERROR, EXIT_PIPE, EXIT_TIMEOUT

    if isinstance(error, BrokenPipeError) and streams.is_broken(sys.stdout):
        streams.silence(sys.stdout)
        return EXIT_PIPE
    if os.environ.get("SNAPENGINE_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    _complain(f"error: {describe(error)}")
    return EXIT_TIMEOUT if isinstance(error, TimeLimitError) else EXIT_ERROR


def _complain(text: str) -> None:
    from snapengine.report.terminal import say

    say(text)
    try:
        sys.stdout.flush()
    except OSError:  # the rest of its buffer cannot be written either
        streams.silence(sys.stdout)
