"""`snapengine save`: one live snapshot of a peer that hands its memory over on a Unix socket."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from snapengine.cli_common import (
    EXIT_CODES,
    EXIT_LOST,
    EXIT_NOT_CONVERGED,
    EXIT_OK,
    argument,
    console,
    print_json,
    raw,
    say,
)
from snapengine.figures import figures_table
from snapengine.options import METHODS, Options
from snapengine.progress import follow
from snapengine.result import COMPLETED, Result
from snapengine.units import parse_seconds, parse_size

DESCRIPTION = """\
Save the memory of a running program. The program (a virtual machine monitor, or `snapengine guest`)
connects to the Unix socket PATH and hands over its memory map and its userfaultfd; it goes on running
while its pages are saved. The image holds the state at one instant.
"""
EPILOG = f"""\
SINK is where the image goes:
  PATH, file:PATH  a file; it appears under its name when it is complete
  exec:COMMAND     the standard input of a shell command
  fd:N             an open file descriptor
  -                standard output; figures and --json then go to stderr

SIZE is a number of bytes, or has a unit: 64M, 1.5GiB (powers of 1024).

examples:
  snapengine save --socket /run/vm.sock vm.img
  snapengine save --socket /run/vm.sock --compress zstd --json vm.img
  snapengine save --socket /run/vm.sock --vmstate devices=dev.bin 'exec:ssh backup "cat > vm.img"'
  snapengine save --socket /run/vm.sock - | zstd > vm.img.zst

{EXIT_CODES}
"""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `save` to the command line."""
    parser = commands.add_parser(
        "save",
        help="save a running peer's memory",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=raw,
    )
    size, seconds = argument(parse_size), argument(parse_seconds)
    add = parser.add_argument
    add("sink", metavar="SINK", help="where the image goes (see below)")
    add("--socket", required=True, metavar="PATH", help="Unix socket to make; the peer connects to it")
    add("--method", choices=METHODS, default=METHODS[0], help="default: %(default)s")
    add("--compress", metavar="none|zstd[:LEVEL]", help="default: none")
    add("--memory-limit", type=size, metavar="SIZE", help="buffer before the sink (default 64M)")
    add(
        "--rate-limit",
        type=size,
        metavar="SIZE",
        help="most bytes a second into the sink (default: no limit)",
    )
    add("--spill-dir", metavar="DIR", help="where what exceeds the buffer is spilled (default: $TMPDIR)")
    add("--vmstate", type=argument(parse_vmstate), action="append", default=[], metavar="NAME=FILE",
        help="store FILE in the image as the blob NAME; may be repeated")  # fmt: skip
    add("--fault-threads", type=int, metavar="N", help="threads that serve write faults (default: one a CPU)")
    add("--downtime-limit", type=seconds, metavar="SECONDS",
        help="dirty logging: longest pause of the last round (default 0.3)")  # fmt: skip
    add("--max-rounds", type=int, metavar="N", help="dirty logging: give up after N rounds (default 30)")
    add("--max-seconds", type=seconds, metavar="SECONDS",
        help="dirty logging: give up after so many seconds (default 300)")  # fmt: skip
    add(
        "--timeout",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="wait so long for the peer (default 60)",
    )
    add("--json", action="store_true", help="print the figures as one JSON object")
    add("--quiet", action="store_true", help="print nothing but errors (and --json)")
    parser.set_defaults(run=run, parser=parser)


def parse_vmstate(text: str) -> tuple[str, Path]:
    """``NAME=FILE``. Raises ValueError."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ValueError(f"{text!r} is not NAME=FILE")
    return name, Path(path)


def make_options(args: argparse.Namespace) -> Options:
    """The options that were given; the others keep the defaults of `Options`. Raises ValueError."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Options)}
    return Options(**{name: value for name, value in given.items() if value is not None})


def read_vmstate(pairs: list[tuple[str, Path]]) -> dict[str, bytes]:
    """The blobs of --vmstate. Raises OSError."""
    return {name: path.read_bytes() for name, path in pairs}


def exit_code(result: Result) -> int:
    """0, or what is special about a capture that ended without an error."""
    if result.status != COMPLETED:
        return EXIT_NOT_CONVERGED
    return EXIT_LOST if result.lost_pages else EXIT_OK


def report(result: Result, args: argparse.Namespace) -> None:
    """Print the figures; on stderr where stdout is the image."""
    out: TextIO = sys.stderr if args.sink in ("-", "fd:1") else sys.stdout
    for warning in result.warnings:
        say(f"warning: {warning}")
    if result.status != COMPLETED:
        say("dirty logging did not converge: the writes outrun the sink; there is no image")
    if result.lost_pages:
        say(f"warning: {result.lost_pages} pages were discarded by the target before they were saved")
    if args.json:
        print_json(result.to_json(), out)
    elif not args.quiet:
        console(out).print(figures_table(result))


def run(args: argparse.Namespace) -> int:
    """The command."""
    from snapengine import snapshot
    from snapengine.peer import PeerTarget

    try:
        options = make_options(args)
    except ValueError as error:
        args.parser.error(str(error))
    names = [name for name, _ in args.vmstate]
    if len(set(names)) < len(names):
        args.parser.error("--vmstate: a name is given twice")
    vmstate = read_vmstate(args.vmstate)
    target = PeerTarget(args.socket, timeout=args.timeout, method=options.method)
    if not args.quiet:
        say(f"waiting for a peer on {args.socket}")
    with snapshot(target, args.sink, options, vmstate=vmstate) as capture:
        follow(capture, args.quiet)
    result = capture.result
    report(result, args)
    return exit_code(result)
