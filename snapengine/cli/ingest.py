"""`snapengine ingest`: converts a virtual machine's migration stream to an image."""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

from snapengine.cli.capture_options import LEFT_OUT, add_options, make_options
from snapengine.cli.common import check_output
from snapengine.cli.save import add_report_options, report
from snapengine.errors import TimeLimitError
from snapengine.report.terminal import EXIT_CODES, EXIT_OK, EXIT_TIMEOUT, raw

EXPIRED_DRAIN_SECONDS = 5.0

DESCRIPTION = """\
Convert a QEMU migration stream to an image: each page once, zero pages left out, checksummed and, with
--compress, compressed. Works as the command of QEMU's `migrate "exec:..."`. Exit code 0 means that the image
is complete. A stream that is truncated, or holds something unknown, leaves no image.
"""
EPILOG = f"""\
STREAM is a file, or - for standard input. SINK is where the image goes: PATH, exec:COMMAND, fd:N, - or null:
(see `snapengine save --help`).

Figures are printed only to a terminal, or with --json: run by QEMU, this command shares QEMU's standard
output. The instant T is not known: the stream does not tell it. After an error the rest of a stream that
comes through a pipe is still read, so that a background-snapshot of QEMU 7.2 ends and its guest goes on.

The content of the stream is not checked against the machine. Without KVM, a plain `migrate` of a running
guest (QEMU 7.2) sometimes sends pages that are too old: use background-snapshot, or stop the guest first.

examples, in QEMU's monitor:
  migrate_set_capability background-snapshot on
  migrate "exec:snapengine ingest --direct - ./vm_state"
  migrate "exec:snapengine ingest --compress zstd - ./vm_state"
and in a shell:
  snapengine ingest old-state.bin vm_state

{EXIT_CODES}
"""


def add_ingest(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add `ingest` to the command line."""
    parser = commands.add_parser(
        "ingest", help=line, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    add = parser.add_argument
    add("stream", metavar="STREAM", help="the stream: a file, or - for standard input")
    add("sink", metavar="SINK", help="where the image goes")
    add("--direct", action="store_true",
        help="write pages as they arrive: for background-snapshot, which sends each page once. Without "
        "--direct a file in --spill-dir keeps the last version of each page")  # fmt: skip
    add_options(parser, LEFT_OUT["ingest"], {
        "spill_dir": "where pages wait for the end of the stream (default: $TMPDIR)",
        "timeout": "give up (and still read the stream to its end, for QEMU)",
    })
    add_report_options(parser)
    parser.set_defaults(run=run, parser=parser)


@contextlib.contextmanager
def opened_stream(path: str) -> Iterator[int]:
    """A descriptor of the stream of the command line."""
    if path == "-":
        yield 0
        return
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "is a directory, not a stream", path)
        yield fd
    finally:
        os.close(fd)


def run(args: argparse.Namespace) -> int:
    """The command."""
    from snapengine.qemu.from_stream import DRAIN_SECONDS, drain, ingest

    rest = math.inf

    def failed(most: float) -> None:
        nonlocal rest
        rest = most

    with opened_stream(args.stream) as fd:
        try:
            options = make_options(args)
            check_output(args.sink)
            result = ingest(fd, args.sink, options, direct=args.direct, failed=failed,
                            name="standard input" if args.stream == "-" else args.stream)  # fmt: skip
        except BaseException as error:
            # QEMU needs a reader until its background-snapshot ends, or the guest stands still for ever.
            # Other migrations do not, but the stream does not say what it is.
            mode = os.fstat(fd).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):  # not a terminal, which would wait for its user
                expired = isinstance(error, TimeLimitError) or getattr(error, "exit_code", 0) == EXIT_TIMEOUT
                drain(fd, EXPIRED_DRAIN_SECONDS if expired else DRAIN_SECONDS, rest)
            raise
    report(result, args, figures=sys.stdout.isatty())
    return EXIT_OK
