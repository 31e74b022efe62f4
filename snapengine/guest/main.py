"""`snapengine guest`: a process that writes to its RAM and hands the RAM over to engines, as a VMM does.

`check_image` finds out from an image alone whether it is a consistent cut. `GuestProcess` starts a guest for
tests and benchmarks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from snapengine.base.socketpath import path_too_long
from snapengine.base.units import parse_size
from snapengine.guest.image import check_image
from snapengine.guest.loop import Guest, GuestLoop, write_line
from snapengine.guest.params import BACKINGS, PAGES, PATTERNS, GuestParams
from snapengine.guest.process import GuestProcess
from snapengine.guest.signals import EndSignals

__all__ = ["GuestProcess", "add_arguments", "check_image", "main", "run"]

EPILOG = """\
examples:
  snapengine guest --socket /tmp/g.sock --size 1G --threads 2 --rate 100000
      1 GiB and two writers, together 100000 pages a second; the guest connects to every engine
      that listens at /tmp/g.sock (snapengine save --socket /tmp/g.sock vm.img)
  snapengine guest --socket /tmp/g.sock --size 256M --backing memfd --pages thp --rate max \\
      --pattern hot --hot-size 16M --zero 30 --holes 20 --duration 60 --json
      shared memory in transparent huge pages; one writer at full speed within 16 MiB;
      30 % zero pages, 20 % never touched; prints counters as JSON after a minute

exit codes:
  0  ended by --duration, SIGINT or SIGTERM
  1  error (one line on stderr gives the reason)
  2  usage error
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `snapengine guest`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--socket", required=True, metavar="PATH", help="Unix socket that engines listen at")
    add("--size", type=_size, default=256 << 20, help="RAM, such as 64M or 2G (default 256M)")
    add("--backing", choices=BACKINGS, default="anon", help="private or shared memory (default anon)")
    add("--pages", choices=PAGES, default="4k", help="4k, transparent huge pages, or hugetlb (default 4k)")
    add("--threads", type=int, default=1, metavar="N", help="writers, 1 to 8 (default 1)")
    add(
        "--rate",
        type=_rate,
        default=10000,
        metavar="PAGES_PER_S",
        help="pages written a second by all writers together; max: no limit; 0: none (default 10000)",
    )
    add("--pattern", choices=PATTERNS, default="uniform", help="order of the written pages (default uniform)")
    add("--hot-size", type=_size, default=0, metavar="SIZE", help="size of the hot set, with --pattern hot")
    add("--zero", type=int, default=0, metavar="PERCENT", help="share of pages that are populated and zero")
    add("--holes", type=int, default=0, metavar="PERCENT", help="share of pages not populated at start")
    add("--incompressible", action="store_true", help="random content (default: zstd makes 4:1 of it)")
    add("--seed", type=int, default=1, metavar="N", help="seed of content and write order (default 1)")
    add("--duration", type=float, default=0.0, metavar="SECONDS", help="end after this time (default: never)")
    add("--json", action="store_true", help="print the counters as JSON at the end")
    add("--stdio", action="store_true", help=argparse.SUPPRESS)  # for GuestProcess


def run(args: argparse.Namespace) -> int:
    """Run a guest with parsed options; return the exit code."""
    try:
        params = GuestParams(
            size=args.size,
            backing=args.backing,
            pages=args.pages,
            threads=args.threads,
            pattern=args.pattern,
            hot_size=args.hot_size,
            zero_percent=args.zero,
            hole_percent=args.holes,
            incompressible=args.incompressible,
            seed=args.seed,
        )
        if fault := path_too_long(args.socket):  # it would never connect
            raise ValueError(fault)
    except ValueError as error:
        print(f"snapengine guest: {error}", file=sys.stderr)
        return 2
    with EndSignals() as signals:
        try:
            guest = Guest(params, args.rate)
        except OSError as error:
            print(f"snapengine guest: {error}", file=sys.stderr)
            return 1
        if args.stdio:
            write_line({"ready": True, "pid": os.getpid()})
        elif not args.json:
            print(f"guest {os.getpid()}: {params.size >> 20} MiB; engines: {args.socket}", flush=True)
        GuestLoop(guest, args.socket, signals, args.stdio, args.duration).run()
        _finish(guest, args.json)
    return 0


def _finish(guest: Guest, as_json: bool) -> None:
    """Print the counters and stop.

    A writer that is blocked in a page fault cannot be joined. Then the process exits without joining.
    """
    try:
        guest.writers.pause(1.0)
        blocked = False
    except TimeoutError:
        blocked = True
    stats: dict[str, Any] = guest.stats()
    with contextlib.suppress(BrokenPipeError):
        if as_json:
            write_line(stats)
        else:
            print(f"guest {stats['pid']}: {sum(stats['writes'])} writes, {stats['handovers']} handovers")
            sys.stdout.flush()
    if blocked:
        os._exit(0)
    guest.writers.close()
    guest.memory.close()


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rate(text: str) -> int | None:
    if text == "max":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor max")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m snapengine.guest`."""
    from snapengine.report.terminal import Parser

    parser = Parser(
        prog="snapengine guest", description="A process that writes to its RAM and hands it over to engines."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))
