"""Restoring of an image from a pipe to memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

from snapengine.image.encode import DATA
from snapengine.image.sections import ImageRegion
from snapengine.image.stream import ImageStream, Pages, stream_image
from snapengine.regions import PAGE_BYTES

BLOCK_BYTES = 2 << 20


class Destination:
    """The destination of one region of a stream: a buffer that is initially all zero."""

    def __init__(self, region: ImageRegion, view: memoryview) -> None:
        self.region = region
        self._view = view
        self._written: set[int] = set()  # blocks with data: only these must be zeroed again

    def write(self, item: Pages) -> None:
        """Write the part of `item` that lies in this region."""
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
    """Restore the regions of an image from a pipe. Returns the stream, read to its end.

    `allocate` is called once per region. It returns a writable, zeroed buffer of the length of the region, or
    None to skip the region. After an error the content of the buffers is undefined.
    """
    stream = stream_image(file)
    destinations: list[Destination] = []
    for region in stream.regions:
        buffer = allocate(region)
        if buffer is None:
            continue
        view = memoryview(buffer).cast("B")
        if len(view) != region.length:
            raise ValueError(f"{region.name}: the buffer has {len(view)} bytes instead of {region.length}")
        destinations.append(Destination(region, view))
    for item in stream:
        for destination in destinations:
            destination.write(item)
    for region in [destination.region for destination in destinations]:
        stream.check_complete(region)
    return stream
