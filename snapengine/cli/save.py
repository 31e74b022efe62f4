"""`snapengine save`: one live snapshot, of a peer that hands its memory over, or of any process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from snapengine.base.names import from_argument
from snapengine.base.units import parse_seconds
from snapengine.cli.capture_options import FLAGS, LEFT_OUT, add_options, make_options
from snapengine.cli.common import after_the_image, argument, check_output
from snapengine.options import METHODS, Options
from snapengine.report.terminal import (
    EXIT_CODES,
    EXIT_LOST,
    EXIT_NOT_CONVERGED,
    EXIT_OK,
    print_json,
    raw,
    say,
)
from snapengine.result import COMPLETED, Result

if TYPE_CHECKING:
    from snapengine.targets.base import Target

DESCRIPTION = """\
Save the memory of a running program. The program keeps running while its pages are saved; the image holds
the state at one instant. A program that cooperates (--socket) connects to the Unix socket PATH and hands
over its memory map and its userfaultfd: a virtual machine monitor, or `snapengine guest`. Any other process
that this user may trace is attached to (--pid).
"""
EPILOG = f"""\
SINK is where the image goes:
  PATH, file:PATH  a file; it appears under its name when it is complete
  exec:COMMAND     the standard input of a shell command
  fd:N             an open file descriptor
  -                standard output; figures and --json then go to stderr
  null:            nowhere: to measure a snapshot

LIST names what to save of a process: all, or some of anon, heap, stack, shared, files and START-END
(hexadecimal), separated by commas. What is not saved is listed in the result, with the reason.

SIZE is a number of bytes, or has a unit: 64M, 1.5GiB (powers of 1024). SECONDS may be 0.3, 300ms or 10.

A process that uses userfaultfd itself (a virtual machine that is being filled, some garbage collectors) can
be saved without that memory: name the rest by --regions; `snapengine doctor --pid PID` lists the addresses.

examples:
  snapengine save --pid 4711 redis.img
  snapengine save --pid 4711 --cut stop app.img && snapengine export --format core app.img app.core
  snapengine save --socket /run/vm.sock vm.img
  snapengine save --socket /run/vm.sock --compress zstd --json vm.img
  snapengine save --socket /run/vm.sock --vmstate devices=dev.bin 'exec:ssh backup "cat > vm.img"'
  snapengine save --socket /run/vm.sock - | zstd > vm.img.zst

{EXIT_CODES}
"""


def add_save(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add `save` to the command line."""
    parser = commands.add_parser(
        "save", help=line, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    seconds = argument(parse_seconds)
    add = parser.add_argument
    add("sink", metavar="SINK", help="where the image goes (see below)")
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("--socket", metavar="PATH", help="Unix socket to make; the peer connects to it")
    whom.add_argument("--pid", type=int, metavar="PID", help="attach to this process")
    add("--regions", type=argument(_regions), metavar="LIST",
        help="--pid: what to save (default: all)")  # fmt: skip
    add("--cut", choices=("soft", "stop"),
        help="--pid: soft stops one thread for a fraction of a millisecond; stop stops all threads while the "
        "memory is protected, and saves registers and unprotectable memory, too (default: soft)")  # fmt: skip
    add_options(parser, LEFT_OUT["save"], {
        "copy_limit": f"--pid: {FLAGS['copy_limit']['help']}",
        "strict": "fail if the target discards memory before it is saved",
    })
    add("--vmstate", type=argument(parse_vmstate), action="append", default=[], metavar="NAME=FILE",
        help="store FILE in the image as the blob NAME; may be repeated")  # fmt: skip
    add("--peer-timeout", type=seconds, default=60.0, metavar="SECONDS",
        help="--socket: longest wait for the peer (default: 60)")  # fmt: skip
    add("--stop-timeout", type=seconds, default=1.0, metavar="SECONDS",
        help="--pid: longest wait for threads to stop; then everything is undone (default: 1)")  # fmt: skip
    add_report_options(parser)
    parser.set_defaults(run=run, parser=parser)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `report` reads."""
    from snapengine.report.metrics import metrics_file

    add = parser.add_argument
    add("--json", action="store_true", help="print the figures as one JSON object")
    add("--quiet", action="store_true", help="print nothing but errors (and --json)")
    add("--metrics", type=argument(metrics_file), metavar="FILE",
        help="write the figures into FILE for Prometheus, as the textfile collector of node_exporter reads "
        "it")  # fmt: skip


def parse_vmstate(text: str) -> tuple[str, Path]:
    """``NAME=FILE``. Raises ValueError."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise ValueError(f"{text!r} is not NAME=FILE")
    return name, Path(path)


def _regions(text: str) -> Any:
    from snapengine.process.selection import parse_regions

    return parse_regions(text)


def read_vmstate(pairs: list[tuple[str, Path]]) -> dict[str, bytes]:
    """The blobs of --vmstate. Raises OSError."""
    return {from_argument(name): path.read_bytes() for name, path in pairs}


def exit_code(result: Result) -> int:
    """0, or the code of a capture that did not converge or lost pages."""
    if result.status != COMPLETED:
        return EXIT_NOT_CONVERGED
    return EXIT_LOST if result.lost_pages else EXIT_OK


def missing_text(result: Result) -> str:
    """One line on the mappings that an image of a process lacks and no file holds; "" if there are none."""
    from snapengine.process.selection import ELSEWHERE, NEEDS_STOP

    lacking = [item for item in result.not_captured if item["reason"] not in ELSEWHERE]
    if not lacking:
        return ""
    size = sum(item["end"] - item["start"] for item in lacking)
    reasons = ", ".join(sorted({item["reason"] for item in lacking}))
    globals_too = any(item["reason"].startswith(NEEDS_STOP) for item in lacking)
    hint = ". That is global variables, and the list of libraries: debuggers need --cut stop" * globals_too
    return f"{len(lacking)} mappings ({size >> 10} KiB) are not in the image: {reasons}{hint}"


def report(result: Result, args: argparse.Namespace, *, figures: bool = True) -> None:
    """Print warnings and `figures`; on stderr where stdout is the image. --quiet: only what is an error."""
    if result.status != COMPLETED:
        say("dirty logging did not converge: the writes outrun the sink; there is no image")
    if result.lost_pages:
        say(f"warning: {result.lost_pages} pages were discarded by the target before they were saved")
    if not args.quiet:
        missing = missing_text(result)
        for warning in [*result.warnings, *([missing] if missing else [])]:
            say(f"warning: {warning}")
    after_the_image(lambda: _print_figures(result, args, figures and not args.quiet))
    if args.metrics:
        from snapengine.report.metrics import write_metrics

        after_the_image(lambda: write_metrics(args.metrics, result))


def _print_figures(result: Result, args: argparse.Namespace, wanted: bool) -> None:
    out: TextIO = sys.stderr if args.sink in ("-", "fd:1") else sys.stdout
    if args.json:
        print_json(result.to_json(), out)
    elif wanted:
        from snapengine.report.result_table import figures_rows
        from snapengine.report.tables import print_table

        print_table(figures_rows(result), out=out)


def make_target(args: argparse.Namespace, options: Options) -> Target:
    """The target that --socket or --pid names."""
    if args.pid is not None:
        from snapengine.process.target import ProcessTarget

        if args.cut == "soft" and options.method != METHODS[0]:
            args.parser.error("--cut soft: dirty logging ends with a stop")
        return ProcessTarget(
            args.pid, args.regions or "all", cut=args.cut or "soft", method=options.method,
            deadline=args.stop_timeout,
        )  # fmt: skip
    from snapengine.handover.peer import PeerTarget

    if args.regions is not None or args.cut is not None:
        args.parser.error("--regions and --cut go with --pid")
    if not args.quiet:
        say(f"waiting for a peer on {args.socket}")
    return PeerTarget(args.socket, timeout=args.peer_timeout, method=options.method)


def run(args: argparse.Namespace) -> int:
    """The command."""
    from snapengine.capture.capture import snapshot
    from snapengine.report.progress import follow

    options = make_options(args)
    check_output(args.sink)
    names = [name for name, _ in args.vmstate]
    if len(set(names)) < len(names):
        args.parser.error("--vmstate: a name is given twice")
    vmstate = read_vmstate(args.vmstate)
    target = make_target(args, options)
    with snapshot(target, args.sink, options, vmstate=vmstate) as capture:
        follow(capture, args.quiet)
    result = capture.result
    report(result, args)
    return exit_code(result)
