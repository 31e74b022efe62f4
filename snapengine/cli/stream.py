"""`info` and `verify` of an image that comes through a pipe: read once, nothing is stored."""

from __future__ import annotations

import contextlib
import sys
import uuid
from typing import Any

from snapengine.base.names import escape
from snapengine.errors import LostPagesError
from snapengine.image.image import region_info
from snapengine.image.stream import ImageStream, stream_image
from snapengine.process.describe import process_info
from snapengine.process.record import ProcessRecord, check_sizes
from snapengine.qemu.blobs import machine_in


def read_stream() -> ImageStream:
    """Standard input, read to its end, every checksum verified. Raises ImageError."""
    stream = stream_image(sys.stdin.buffer)
    for _ in stream:
        pass
    return stream


def stream_info(stream: ImageStream) -> dict[str, Any]:
    """The same keys as `Image.info`, without those that need the whole file at hand."""
    parent = stream.header.parent_id
    return {
        "format": ".".join(map(str, stream.header.version)),
        "id": str(stream.id),
        "parent": str(uuid.UUID(bytes=parent)) if any(parent) else None,
        "file_bytes": stream.stats["image_bytes"],
        "chunks": stream.index.count,
        "regions": [region_info(region) for region in stream.regions],
        "vmstate": {escape(name): size for name, size in stream.vmstate.sizes().items()},
        "process": process_info(process_of(stream), stream.regions),
        "machine": machine_in(stream.vmstate, stream.name),
        "stats": stream.stats,
    }


def process_of(stream: ImageStream) -> ProcessRecord | None:
    """The process record of a stream that was read to its end. Raises ImageError."""
    if "process" not in stream.vmstate:
        return None
    check_sizes(stream.vmstate.sizes(), stream.name)
    return ProcessRecord.from_vmstate(stream.vmstate, stream.name)


def verify_stream() -> dict[str, Any]:
    """What the image holds, by the names of `VerifyReport`. Raises ImageError."""
    stream = read_stream()
    totals = [0, 0, 0, 0]  # data, zero, hole, lost
    for region in stream.regions:
        with contextlib.suppress(LostPagesError):  # the image says so itself, and is sound
            stream.check_complete(region)
        runs = stream.index.resolve(region.first_page, region.first_page + region.pages)
        totals = [sum(pair) for pair in zip(totals, runs.totals(), strict=True)]
    return {
        "chunks": stream.index.count,
        "file_bytes": stream.stats["image_bytes"],
        "region_bytes": sum(region.length for region in stream.regions),
        "data_pages": totals[0],
        "zero_pages": totals[1],
        "hole_pages": totals[2],
        "lost_pages": totals[3],
        "duplicate_pages": stream.index.data_pages() - totals[0],
        "vmstate_bytes": sum(stream.vmstate.sizes().values()),
    }
