"""`snapengine info`, `verify`, `restore`, `export`: what is in an image, is it whole, and out with it."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from snapengine.cli_common import EXIT_CODES, EXIT_OK, console, print_json, raw, say
from snapengine.cli_stream import read_stream, stream_info, verify_stream
from snapengine.errors import ImageError
from snapengine.figures import figures_table
from snapengine.names import from_argument, printable, unescape
from snapengine.processinfo import process_rows
from snapengine.qemu.blobs import read_machine
from snapengine.qemu.info import machine_rows
from snapengine.result import Result
from snapengine.units import format_count, format_size

if TYPE_CHECKING:
    from snapengine.core import Lost
    from snapengine.image import Image
    from snapengine.sections import ImageRegion

PIECE_BYTES = 4 << 20  # read and written at once by `restore`

REGION_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("region", "left"), ("address", "right"), ("size", "right"), ("page size", "right"), ("kind", "left"),
)  # fmt: skip

IMAGE_HELP = "the image: a file, or - for standard input"
INFO = """\
Print what is in an image: the figures of the capture, the process (if it was attached to), the QEMU
machine (if it is one), the regions of memory, the named blobs.
Checks the index, not every page: that is `verify`.
"""
VERIFY = """\
Read all of an image and check every checksum. Exit code 1 and the place of the fault if one is wrong.
"""
RESTORE = """\
Write the memory of one region, as it was at T, into a file or to standard output: raw bytes from the
first to the last, holes as zeros.
"""
EXPORT = """\
Write the memory as other tools read it. Zeros and holes take no room in the file (it is sparse).

  --format raw   the bytes of the memory; without --region all regions, one behind the other
  --format core  an attached process as an ELF core, for gdb: memory, threads, mapped files
"""


def add_parsers(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the four to the command line."""
    info = _add(commands, "info", "what is in an image", INFO, "snapengine info vm.img", run_info)
    verify = _add(commands, "verify", "check every byte of an image", VERIFY,
                  "snapengine verify vm.img && rm vm.old\n  ssh backup cat vm.img | snapengine verify -",
                  run_verify)  # fmt: skip
    for parser in (info, verify):
        parser.add_argument("--json", action="store_true", help="print a JSON object")
    restore = _add(commands, "restore", "one region as raw bytes", RESTORE,
                   "snapengine restore vm.img -o ram.bin\n  snapengine restore vm.img ram0 -o - | sha256sum",
                   run_restore)  # fmt: skip
    restore.add_argument("region", nargs="?", metavar="REGION", help="its name; needed if there are several")
    restore.add_argument("-o", "--output", required=True, metavar="FILE", help="a file, or - for stdout")
    export = _add(commands, "export", "the memory as a raw file or an ELF core", EXPORT,
                  "snapengine export vm.img ram.raw --region ram0\n"
                  "  snapengine export --format core app.img app.core && gdb app app.core",
                  run_export)  # fmt: skip
    export.add_argument("output", metavar="OUT", help="the file to write")
    export.add_argument("--region", metavar="NAME", help="raw: only this region")
    export.add_argument("--format", choices=["raw", "core"], default="raw", help="default: raw")
    export.add_argument("--lost", choices=["refuse", "omit"],
        help="core: pages lost at capture time (default: refuse; omit leaves them out)")  # fmt: skip
    export.set_defaults(parser=export)


def _add(
    commands: argparse._SubParsersAction[Any], name: str, short: str, text: str, examples: str, run: Any
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=short, description=text, epilog=f"examples:\n  {examples}\n\n{EXIT_CODES}\n",
        formatter_class=raw,
    )  # fmt: skip
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.set_defaults(run=run)
    return parser


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image]:
    """The image of the command line. A pipe is copied into an unnamed file first: pages come in any order."""
    from snapengine.image import open_image

    with contextlib.ExitStack() as stack:
        file: Any = path
        if path == "-":
            file = sys.stdin.buffer
            if not file.seekable():
                file = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(sys.stdin.buffer, file, PIECE_BYTES)
                file.flush()
        yield stack.enter_context(open_image(file))


def is_pipe(path: str) -> bool:
    """The image can only be read once, front to back."""
    return path == "-" and not sys.stdin.buffer.seekable()


def chosen_region(image: Image, name: str | None) -> ImageRegion:
    """The region that was asked for, or the only one. `NoSuchRegionError`, ValueError."""
    if name is not None:
        return image.region(from_argument(name))
    if len(image.regions) == 1:
        return image.regions[0]
    names = ", ".join(printable(region.name) for region in image.regions) or "none"
    raise ValueError(f"which region? {image.name} has: {names}")


def read_info(path: str) -> dict[str, Any]:
    """The figures of the capture, and beside them what the image holds."""
    if is_pipe(path):
        info = stream_info(read_stream())
    else:
        with opened(path) as image:
            info = image.info() | {"machine": read_machine(image)}
    stats: dict[str, Any] = info.pop("stats")
    return stats | info


def run_info(args: argparse.Namespace) -> int:
    """`info`."""
    info = read_info(args.image)
    if args.json:
        print_json(info)
    else:
        print_info(info)
    return EXIT_OK


def print_info(info: dict[str, Any]) -> None:
    """Figures, the process, regions, blobs."""
    out = console()
    out.print(f"image {info['id']}, format {info['format']}, {format_size(info['file_bytes'])}\n")
    names = {field.name for field in fields(Result)}
    needed = {f.name for f in fields(Result) if f.default is MISSING and f.default_factory is MISSING}
    if needed <= info.keys():  # an embedder that writes an image itself may give no figures
        out.print(figures_table(Result(**{name: value for name, value in info.items() if name in names})))
    table = Table(box=None, pad_edge=False, header_style="")
    for title, justify in REGION_COLUMNS:
        table.add_column(title, justify=justify)
    for region in info["regions"]:
        size, page = format_size(region["length"]), format_size(region["page_size"])
        table.add_row(printable(unescape(region["name"])), f"{region['addr']:#x}", size, page, region["kind"])
    rows = process_rows(info["process"]) if info["process"] is not None else []
    if info["machine"] is not None:
        rows += machine_rows(info["machine"])
    if rows:
        about = Table.grid(padding=(0, 2))
        for row in rows:
            about.add_row(*row)
        out.print()
        out.print(about)
    out.print()
    out.print(table)
    for name, size in info["vmstate"].items():
        out.print(f"\nvmstate {printable(unescape(name))}: {format_size(size)}")


def run_verify(args: argparse.Namespace) -> int:
    """`verify`."""
    try:
        report = verify_stream() if is_pipe(args.image) else verify_file(args.image)
    except ImageError as error:
        if args.json:
            print_json({"ok": False, "error": str(error), "offset": error.offset})
        raise
    if args.json:
        print_json({"ok": True} | report)
    else:
        size, pages = format_size(report["file_bytes"]), format_count(report["data_pages"])
        print(f"{args.image}: ok, {size}, {report['chunks']} chunks, {pages} data pages")
    return EXIT_OK


def verify_file(path: str) -> dict[str, Any]:
    """What the image holds. Raises ImageError."""
    with opened(path) as image:
        return asdict(image.verify())


def run_restore(args: argparse.Namespace) -> int:
    """`restore`."""
    with opened(args.image) as image:
        region = chosen_region(image, args.region)
        if args.output == "-":
            write_out(image, region)
        else:
            image.export_raw(region, args.output)
    return EXIT_OK


def write_out(image: Image, region: ImageRegion) -> None:
    """A region to stdout, in pieces."""
    for offset in range(0, region.length, PIECE_BYTES):
        sys.stdout.buffer.write(image.read(region, offset, min(PIECE_BYTES, region.length - offset)))
    sys.stdout.buffer.flush()


def run_export(args: argparse.Namespace) -> int:
    """`export`."""
    if args.format == "core" and args.region is not None:
        args.parser.error("--region goes with --format raw: a core has all of the memory")
    if args.format == "raw" and args.lost is not None:
        args.parser.error("--lost goes with --format core: a raw file has no place for a lost page")
    with opened(args.image) as image:
        if args.format == "core":
            write_core(image, args.output, args.lost or "refuse")
        else:
            region = None if args.region is None else chosen_region(image, args.region)
            say(f"{args.output}: {format_size(image.export_raw(region, args.output))}")
    return EXIT_OK


def write_core(image: Image, path: str, lost: Lost) -> None:
    """A core, and what is not in it, in one line each."""
    core = image.export_core(path, lost=lost)
    process = image.process
    threads = f"{format_count(core.threads)} thread{'s' * (core.threads != 1)}"
    say(f"{path}: {format_size(core.stored_bytes)} of memory, {threads}")
    if process is not None and process.cut == "soft":
        say("a soft cut has no registers: debuggers see the memory, but no backtraces")
    if core.lost_bytes:
        say(f"left out: {format_size(core.lost_bytes)} that were lost at capture time")
