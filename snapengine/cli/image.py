"""`snapengine info` and `verify`: the contents of an image, and its check."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any

from snapengine.base.names import printable, unescape
from snapengine.base.units import format_count, format_size
from snapengine.cli.common import add_timeout
from snapengine.errors import ImageError, LostPagesError
from snapengine.report.terminal import EXIT_CODES, EXIT_OK, print_json, raw, say

if TYPE_CHECKING:
    from snapengine.image import Image
    from snapengine.image.image import LostPages
    from snapengine.image.stream import ImageStream

COPY_BYTES = 4 << 20

REGION_TITLES = ("region", "address", "size", "page size", "kind")

IMAGE_HELP = "the image: a file, or - for standard input"
LOST_ZERO = "zero reads pages that were lost at capture time as zeros"
INFO = """\
Print what is in an image: the figures of the capture, the process (if it was attached to), the QEMU
machine (if it is one), the regions of memory, the named blobs.
Checks the index, not every page: that is `verify`.
"""
VERIFY = """\
Read all of an image and check every checksum. If one is wrong: exit code 1 and the offset of the fault.
"""
def add_info(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add `info` to the command line."""
    parser = add_image_command(commands, "info", line, INFO, "snapengine info vm.img")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run_info)


def add_verify(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add `verify` to the command line."""
    examples = "snapengine verify vm.img && rm vm.old\n  ssh backup cat vm.img | snapengine verify -"
    parser = add_image_command(commands, "verify", line, VERIFY, examples)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run_verify)


def add_image_command(
    commands: argparse._SubParsersAction[Any], name: str, line: str, text: str, examples: str
) -> argparse.ArgumentParser:
    """A command whose first argument is an image."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=line, description=text, epilog=f"examples:\n  {examples}\n\n{EXIT_CODES}\n",
        formatter_class=raw,
    )  # fmt: skip
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    add_timeout(parser, "give up")
    parser.set_defaults(parser=parser)
    return parser


@contextlib.contextmanager
def opened(path: str, lost: LostPages = "refuse") -> Iterator[Image]:
    """The image of the command line. A pipe is first copied into an unnamed file, for random access."""
    from snapengine.image import open_image

    with contextlib.ExitStack() as stack:
        file: Any = path
        if path == "-":
            file = sys.stdin.buffer
            if not file.seekable():
                file = stack.enter_context(tempfile.TemporaryFile())
                _copy(sys.stdin.buffer, file)
                file.flush()
        yield stack.enter_context(open_image(file, lost=lost))


@contextlib.contextmanager
def lost_pages_as(image: Image, lost: LostPages) -> Iterator[None]:
    """Say how many lost pages read as zeros; where they are refused, name the option."""
    if lost == "zero" and (pages := image.lost_pages()):
        what = "1 page that was lost at capture time reads"
        if pages > 1:
            what = f"{format_count(pages)} pages that were lost at capture time read"
        say(f"warning: {what} as zeros")
    try:
        yield
    except LostPagesError as error:
        raise LostPagesError(f"{error}: --lost zero reads such pages as zeros") from None


def _copy(source: Any, file: Any) -> None:
    while data := source.read(COPY_BYTES):
        file.write(data)


def is_pipe(path: str) -> bool:
    """The image can only be read once, front to back."""
    return path == "-" and not sys.stdin.buffer.seekable()


def read_info(path: str) -> dict[str, Any]:
    """The figures of the capture, and beside them what the image holds."""
    if is_pipe(path):
        from snapengine.image.stream import stream_image

        info = complete_info(stream_image(sys.stdin.buffer).read_to_end())
    else:
        with opened(path) as image:
            info = complete_info(image)
    stats: dict[str, Any] = info.pop("stats")
    return stats | info


def complete_info(image: Image | ImageStream) -> dict[str, Any]:
    """What the image is, and the process or the machine that it is of. Raises ImageError."""
    from snapengine.process.describe import process_info
    from snapengine.process.record import process_of
    from snapengine.qemu.blobs import machine_of

    return image.info() | {
        "process": process_info(process_of(image), image.regions),
        "machine": machine_of(image),
    }


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
    from snapengine.process.describe import process_rows
    from snapengine.report.machine_rows import machine_rows
    from snapengine.report.result_table import figures_rows
    from snapengine.report.tables import print_table, print_text
    from snapengine.result import Result

    print_text(f"image {info['id']}, format {info['format']}, {format_size(info['file_bytes'])}")
    print()
    names = {field.name for field in fields(Result)}
    needed = {f.name for f in fields(Result) if f.default is MISSING and f.default_factory is MISSING}
    rows: list[tuple[str, ...]] = []
    if needed <= info.keys():  # an embedder that writes an image itself may give no figures
        rows += figures_rows(Result(**{name: value for name, value in info.items() if name in names}))
    about = process_rows(info["process"]) if info["process"] is not None else []
    if info["machine"] is not None:
        about += machine_rows(info["machine"])
    print_table([*rows, *([()] if about else []), *about])
    print()
    print_table([_region_row(region) for region in info["regions"]], titles=REGION_TITLES, right=(1, 2, 3))
    for name, size in info["vmstate"].items():
        print()
        print_text(f"vmstate {printable(unescape(name))}: {format_size(size)}")


def _region_row(region: dict[str, Any]) -> tuple[str, ...]:
    sizes = format_size(region["length"]), format_size(region["page_size"])
    return printable(unescape(region["name"])), f"{region['addr']:#x}", *sizes, region["kind"]


def run_verify(args: argparse.Namespace) -> int:
    """`verify`."""
    try:
        report = verified(args.image)
    except ImageError as error:
        if args.json:
            print_json({"ok": False, "error": str(error), "offset": error.offset})
        raise
    if args.json:
        print_json({"ok": True} | report)
    else:
        size, pages = format_size(report["file_bytes"]), format_count(report["data_pages"])
        print(f"{printable(args.image)}: ok, {size}, {report['chunks']} chunks, {pages} data pages")
    return EXIT_OK


def verified(path: str) -> dict[str, Any]:
    """What the image holds, every byte of which was read. Raises ImageError."""
    if is_pipe(path):
        from snapengine.image.stream import stream_image

        return asdict(stream_image(sys.stdin.buffer).read_to_end().verify())
    with opened(path) as image:
        return asdict(image.verify())
