"""`snapengine guest`: a process that owns RAM, dirties it, and hands itself over to engines like a VMM.

Its memory tells by itself whether an image of it is a consistent cut (`check_image`). `GuestProcess` starts
one for tests and measurements.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

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
      1 GiB, two writers, together 100000 pages a second; every engine that listens at
      /tmp/g.sock gets it (snapengine save --socket /tmp/g.sock vm.img)
  snapengine guest --socket /tmp/g.sock --size 256M --backing memfd --pages thp --rate max \\
      --pattern hot --hot-size 16M --zero 30 --holes 20 --duration 60 --json
      shared memory of transparent huge pages, as fast as one writer can, only 16 MiB of it;
      a third zero pages, a fifth never touched; counters as JSON after a minute

exit codes:
  0  ended by --duration, SIGINT or SIGTERM
  1  error (one line on stderr says what and why)
  2  wrong usage
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
    add("--pattern", choices=PATTERNS, default="uniform", help="which pages (default uniform)")
    add("--hot-size", type=_size, default=0, metavar="SIZE", help="with --pattern hot: the hot set")
    add("--zero", type=int, default=0, metavar="PERCENT", help="share of populated zero pages")
    add("--holes", type=int, default=0, metavar="PERCENT", help="share never touched before a writer does")
    add("--incompressible", action="store_true", help="random content; else zstd makes a quarter of it")
    add("--seed", type=int, default=1, metavar="N", help="of the content and the order of writes (default 1)")
    add("--duration", type=float, default=0.0, metavar="SECONDS", help="end by itself (default: never)")
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
            print(f"guest {os.getpid()}: {params.size >> 20} MiB; hands over at {args.socket}", flush=True)
        GuestLoop(guest, args.socket, signals, args.stdio, args.duration).run()
        _finish(guest, args.json)
    return 0


def _finish(guest: Guest, as_json: bool) -> None:
    """Print the counters and stop. Writers that stand in a fault cannot be joined, only be ended with the
    process; it ends at once then."""
    try:
        guest.writers.pause(1.0)
        stuck = False
    except TimeoutError:
        stuck = True
    stats: dict[str, Any] = guest.stats()
    with contextlib.suppress(BrokenPipeError):
        if as_json:
            write_line(stats)
        else:
            print(f"guest {stats['pid']}: {sum(stats['writes'])} writes, {stats['handovers']} handovers")
            sys.stdout.flush()
    if stuck:
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
    """`snapengine guest` as a program of its own."""
    from snapengine.report.terminal import Parser

    parser = Parser(
        prog="snapengine guest", description="A process that owns RAM, writes it and hands itself over."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))
