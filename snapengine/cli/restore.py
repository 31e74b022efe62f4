"""`snapengine restore` and `export`: the memory out of an image, as other programs read it."""

from __future__ import annotations

import argparse
import contextlib
import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from snapengine.base.names import from_argument, printable
from snapengine.base.units import format_count, format_size
from snapengine.cli.common import check_output
from snapengine.cli.image import LOST_ZERO, add_image_command, lost_pages_as, opened
from snapengine.errors import LostPagesError, SinkError
from snapengine.report.terminal import EXIT_OK, say

if TYPE_CHECKING:
    from snapengine.export.elf_core import Lost
    from snapengine.image import Image
    from snapengine.image.sections import ImageRegion
    from snapengine.storage.sinks import Sink

RESTORE = """\
Write the memory of one region, as it was at T, into a file or to standard output: raw bytes from the
first to the last, holes as zeros.
"""
EXPORT = """\
Write the memory as other tools read it. Zeros and holes take no room in the file (it is sparse).

  --format raw   the bytes of the memory; without --region all regions, one behind the other
  --format core  an attached process as an ELF core, for gdb: memory, threads, mapped files
"""


SOFT_CORE = (
    "a soft cut has no registers, and no data of programs and libraries: debuggers show neither threads nor "
    "variables of it (`snapengine save --cut stop` saves both)"
)


def add_restore(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add `restore` to the command line."""
    examples = "snapengine restore vm.img -o ram.bin\n  snapengine restore vm.img ram0 -o - | sha256sum"
    parser = add_image_command(commands, "restore", line, RESTORE, examples)
    add = parser.add_argument
    add("region", nargs="?", metavar="REGION", help="its name, as `info` shows it; needed if there are more")
    add("-o", "--output", required=True, metavar="OUT", help="PATH, fd:N, exec:COMMAND, or - for stdout")
    add("--lost", choices=["refuse", "zero"], default="refuse", help=f"{LOST_ZERO} (default: refuse)")
    parser.set_defaults(run=run_restore)


def add_export(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add `export` to the command line."""
    examples = (
        "snapengine export vm.img ram.raw --region ram0\n"
        "  snapengine export --format core app.img app.core && gdb app app.core\n"
        "  snapengine export --format core app.img - | zstd > app.core.zst"
    )
    parser = add_image_command(commands, "export", line, EXPORT, examples)
    add = parser.add_argument
    add("output", metavar="OUT", help="where to: PATH, fd:N, exec:COMMAND, or - for stdout")
    add("--region", metavar="NAME", help="raw: only this region")
    add("--format", choices=["raw", "core"], default="raw", help="default: raw")
    add("--lost", choices=["refuse", "omit", "zero"], default="refuse",
        help=f"core: omit leaves pages out that were lost at capture time; raw: {LOST_ZERO} (default: "
        "refuse)")  # fmt: skip
    parser.set_defaults(run=run_export)


def chosen_region(image: Image, name: str | None) -> ImageRegion:
    """The region that was asked for, or the only one. `NoSuchRegionError`, ValueError."""
    if name is not None:
        return image.region(from_argument(name))
    if len(image.regions) == 1:
        return image.regions[0]
    names = ", ".join(printable(region.name) for region in image.regions) or "none"
    raise ValueError(f"which region? {image.name} has: {names}")


def run_restore(args: argparse.Namespace) -> int:
    """`restore`."""
    from snapengine.export.raw import export_raw

    with opened(args.image, args.lost) as image:
        region = chosen_region(image, args.region)
        with lost_pages_as(image, args.lost), _output(args.output) as sink:
            export_raw(image, sink, region)
    return EXIT_OK


@contextlib.contextmanager
def _output(spec: str) -> Iterator[Sink]:
    """The output of the command line, as the library takes it."""
    from snapengine.storage.sinks import open_sink

    check_output(spec)
    sink = open_sink(spec)
    try:
        yield sink
    except SinkError as error:
        sink.abort()
        if spec == "-" and error.errno == errno.EPIPE:
            raise BrokenPipeError(errno.EPIPE, str(error)) from None  # the reader has seen enough
        raise
    except BaseException:
        sink.abort()
        raise


def run_export(args: argparse.Namespace) -> int:
    """`export`."""
    from snapengine.export.raw import export_raw

    if args.format == "core" and args.region is not None:
        args.parser.error("--region goes with --format raw: a core has all of the memory")
    if args.lost == ("omit" if args.format == "raw" else "zero"):
        other = "core" if args.format == "raw" else "raw"
        args.parser.error(f"--lost {args.lost} goes with --format {other}")
    if args.format == "core":
        with opened(args.image) as image:
            write_core(image, args.output, args.lost)
    else:
        with opened(args.image, args.lost) as image:
            region = None if args.region is None else chosen_region(image, args.region)
            with lost_pages_as(image, args.lost), _output(args.output) as sink:
                say(f"{args.output}: {format_size(export_raw(image, sink, region))}")
    return EXIT_OK


def write_core(image: Image, path: str, lost: Lost) -> None:
    """A core, and what is not in it, in one line each."""
    from snapengine.export.elf_core import export_core
    from snapengine.process.record import process_of

    try:
        with _output(path) as sink:
            core = export_core(image, sink, lost=lost)
    except LostPagesError as error:
        raise LostPagesError(f"{error}: --lost omit leaves such pages out of the core") from None
    process = process_of(image)
    threads = f"{format_count(core.threads)} thread{'s' * (core.threads != 1)}"
    say(f"{path}: {format_size(core.stored_bytes)} of memory, {threads}")
    if process is not None and process.cut == "soft":
        say(SOFT_CORE)
    if core.lost_bytes:
        say(f"left out: {format_size(core.lost_bytes)} that were lost at capture time")
