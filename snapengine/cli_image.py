"""`snapengine info`, `verify`, `restore`, `export`: what is in an image, is it whole, and out with it."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table

from snapengine.cli_common import EXIT_CODES, EXIT_OK, console, print_json, raw, say
from snapengine.errors import ImageError
from snapengine.units import format_count, format_size

if TYPE_CHECKING:
    from snapengine.image import Image

PIECE_BYTES = 4 << 20  # read and written at once by `restore`

IMAGE_HELP = "the image: a file, or - for standard input"
INFO = """\
Print what is in an image: the figures of the capture, the regions of memory, the named blobs.
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
Write the memory into a raw file, as other tools read it. Zeros and holes take no room in it (the file is
sparse). Without --region all regions are written one after another, each from a page boundary on.
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
    export = _add(commands, "export", "the memory as a sparse raw file", EXPORT,
                  "snapengine export vm.img ram.raw --region ram0", run_export)  # fmt: skip
    export.add_argument("output", metavar="OUT", help="the file to write")
    export.add_argument("--region", metavar="NAME", help="only this region")
    export.add_argument("--format", choices=["raw"], default="raw", help="default: raw, the only one so far")


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
    """The image of the command line; errors name the file."""
    from snapengine import open_image

    try:
        with open_image(sys.stdin.buffer if path == "-" else path) as image:
            yield image
    except ImageError as error:
        error.args = (f"{'standard input' if path == '-' else path}: {error}",)
        raise


def region_name(image: Image, name: str | None) -> str:
    """The region that was asked for, or the only one. Raises ValueError."""
    names = [region.name for region in image.regions]
    if name is None and len(names) == 1:
        return names[0]
    if name is None:
        raise ValueError(f"which region? The image has: {', '.join(names) or 'none'}")
    if name not in names:
        raise ValueError(f"there is no region {name!r}; the image has: {', '.join(names) or 'none'}")
    return name
