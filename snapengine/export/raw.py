"""Export of an image as a raw file, which contains only the bytes of its regions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from snapengine.image.encode import ZERO
from snapengine.image.restorer import Restorer
from snapengine.image.sections import ImageRegion
from snapengine.storage.sink import write_all
from snapengine.storage.sinks import FileSink, Sink, atomic_output

if TYPE_CHECKING:
    from snapengine.image.image import Image, RegionSpec

BLOCK = bytes(1 << 20)
PIECE_BYTES = 4 << 20


def export_raw(
    image: Image,
    out: str | os.PathLike[str] | Sink,
    region: RegionSpec | None = None,
    *,
    zeros: Literal["sparse", "write"] = "sparse",
) -> int:
    """Write the bytes of a region (None: of all regions, concatenated) to a raw file. Returns its size.

    ``out`` may be a `snapengine.storage.sinks.Sink`, such as ``open_sink("-")``. A sink that is not a file is
    written sequentially. A file gets its name at the end, when it is complete.

    Holes are holes in the file. So are zero pages, unless ``zeros="write"``: they are then written as zeros,
    so that the allocation of the file matches that of the memory.

    Raises
    ------
    NoSuchRegionError, ImageError, LostPagesError
        As `Image.read`.
    SinkError
        The output cannot be written. No partial file is left.
    """
    # Written by pwrite, not through a mapping: a full disk then causes ENOSPC, not SIGBUS.
    regions = image.regions if region is None else [image.region(region)]
    plans = [(image.restorer(each, 0, each.length), each.length) for each in regions]
    with atomic_output(out) as sink:
        if not isinstance(sink, FileSink):
            for each in regions:
                for piece in pieces(image, each):
                    write_all(sink, piece)
            return sum(length for _, length in plans)
        fd, start = sink.fd, 0
        for plan, length in plans:
            os.ftruncate(fd, start + length)  # unwritten ranges are holes
            plan.into_file(fd, start, 0, plan.jobs)
            if zeros == "write":
                _write_zeros(plan, fd, start)
            start += length
        return start


def pieces(image: Image, region: ImageRegion, start: int = 0, end: int | None = None) -> Iterator[bytearray]:
    """Bytes [start, end) of a region, in pieces. Holes, zero pages and lost pages read as zeros."""
    end = region.length if end is None else end
    for offset in range(start, end, PIECE_BYTES):
        length = min(PIECE_BYTES, end - offset)
        piece = bytearray(length)
        low = region.start_byte + offset
        plan = Restorer(image.index, image.resolve(region, offset, length), low, low + length)
        plan.into_memory(piece, 0, plan.jobs)
        yield piece


def _write_zeros(plan: Restorer, fd: int, start: int) -> None:
    for offset, count in plan.spans(ZERO):
        position = start + offset
        end = position + count
        while position < end:
            position += os.pwrite(fd, BLOCK[: end - position], position)
