"""An image from a pipe into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

from snapengine.image.encode import DATA
from snapengine.image.sections import ImageRegion
from snapengine.image.stream import ImageStream, Pages, stream_image
from snapengine.regions import PAGE_BYTES

BLOCK_BYTES = 2 << 20


class Destination:
    """Where one region of a stream goes: a buffer that was all zero at the start."""

    def __init__(self, region: ImageRegion, view: memoryview) -> None:
        self.region = region
        self._view = view
        self._written: set[int] = set()  # blocks that have got data: only these need to be zeroed again

    def place(self, item: Pages) -> None:
        """The part of `item` that lies in this region."""
        low = self.region.start_byte
        start = max(item.page * PAGE_BYTES, low)
        end = min((item.page + item.pages) * PAGE_BYTES, low + self.region.length)
        if start >= end:
            return
        blocks = range((start - low) // BLOCK_BYTES, (end - low - 1) // BLOCK_BYTES + 1)
        if item.kind == DATA:
            skipped = start - item.page * PAGE_BYTES
            self._view[start - low : end - low] = item.data[skipped : skipped + end - start]
            self._written.update(blocks)
            return
        for block in self._written.intersection(blocks) if self._written else ():
            first = max(start - low, block * BLOCK_BYTES)
            last = min(end - low, (block + 1) * BLOCK_BYTES)
            self._view[first:last] = bytes(last - first)


def restore_stream(file: BinaryIO, allocate: Callable[[ImageRegion], Any]) -> ImageStream:
    """Restore every region of an image from a pipe; returns the finished stream.

    `allocate` is called once per region and returns a writable, zeroed buffer of its length, or None to
    leave the region out. When this raises, the buffers' content is undefined.
    """
    stream = stream_image(file)
    wanted: list[Destination] = []
    for region in stream.regions:
        buffer = allocate(region)
        if buffer is None:
            continue
        view = memoryview(buffer).cast("B")
        if len(view) != region.length:
            raise ValueError(f"{region.name}: a buffer of {len(view)} bytes for {region.length}")
        wanted.append(Destination(region, view))
    for item in stream:
        for destination in wanted:
            destination.place(item)
    for region in [destination.region for destination in wanted]:
        stream.check_complete(region)
    return stream
