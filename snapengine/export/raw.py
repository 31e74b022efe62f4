"""An image as a raw file: the bytes of its regions, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from snapengine.image.encode import ZERO
from snapengine.image.restorer import Restorer
from snapengine.image.sections import ImageRegion
from snapengine.storage.sinks import FileSink, Sink, put, whole

if TYPE_CHECKING:
    from snapengine.image import Image

BLOCK = bytes(1 << 20)
PIECE_BYTES = 4 << 20


def export_raw(
    image: Image, regions: list[ImageRegion], out: str | os.PathLike[str] | Sink, write_zeros: bool
) -> int:
    """Write the regions one behind the other; a file appears, complete, under its name at the end.

    With pwrite, not through a mapping: a full disk is then ENOSPC and not SIGBUS. Another sink than a file
    gets the bytes in their order. Returns the size. `SinkError`: it cannot be written; nothing of a file is
    left.
    """
    plans = [(image.restorer(region, 0, region.length), region.length) for region in regions]
    with whole(out) as sink:
        if not isinstance(sink, FileSink):
            for region in regions:
                for piece in pieces(image, region):
                    put(sink, piece)
            return sum(length for _, length in plans)
        fd, start = sink.fd, 0
        for plan, length in plans:
            os.ftruncate(fd, start + length)  # what is not written stays a hole
            plan.into_file(fd, start, 0, plan.jobs)
            if write_zeros:
                _write_zeros(plan, fd, start)
            start += length
        return start


def pieces(image: Image, region: ImageRegion, start: int = 0, end: int | None = None) -> Iterator[bytearray]:
    """Bytes [start, end) of a region in their order, in pieces; holes, zero pages and lost pages as zeros."""
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
