"""Bytes in from a pipe: the same checks as `Image.verify`, in one pass and without seeking."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from snapengine.errors import ImageError, LostPagesError
from snapengine.packing import DATA, LOST
from snapengine.reader import PageIndex
from snapengine.records import (
    FILE_HEADER,
    KNOWN_TYPES,
    Record,
    read_file_header,
    read_payload,
    read_record,
    skip_payload,
)
from snapengine.sections import (
    INDEX_ENTRY_BYTES,
    ImageRegion,
    VmStateParts,
    check_regions,
    page_text,
    parse_regions,
    parse_stats,
    parse_trailer,
)
from snapengine.sources import StreamSource, corrupt
from snapengine.targets import PAGE_BYTES

__all__ = ["ImageStream", "Pages", "restore_stream", "stream_image"]


class Pages(NamedTuple):
    """One run of a chunk, in the order of the file. A later run replaces an earlier one."""

    page: int
    """Number in the image's page numbering (see `ImageRegion.first_page`)."""
    pages: int
    kind: int
    """0 data, 1 zero, 2 hole, 3 lost."""
    data: memoryview
    """`pages` * 4096 bytes for data, else empty."""


class ImageStream:
    """An image read once, front to back. Iterate it to its end; only then is it known to be complete.

    `regions` and `id` are there at once, `vmstate` (name -> bytes) and `stats` after the last item. The
    file object remains the caller's, and nothing behind the trailer may follow in it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._source = StreamSource(file)
        self.header = read_file_header(self._source)
        self.id = uuid.UUID(bytes=self.header.image_id)
        self.regions: list[ImageRegion] = []
        self.vmstate: dict[str, bytes] = {}
        self.stats: dict[str, Any] = {}
        self.index = PageIndex(self._source.name)
        self._offset = FILE_HEADER.size
        self._seq = 0
        self._vmstate = VmStateParts(self._source)
        self._blobs: dict[str, list[bytes]] = {}
        self._offsets: dict[bytes, int] = {}
        self._listed = PageIndex(self._source.name)
        self._listed_end = FILE_HEADER.size
        self._listed_vmstate = 0
        self._read_regions()

    @property
    def name(self) -> str:
        """The stream's name, for messages."""
        return self._source.name

    def _next(self) -> tuple[Record, bytes]:
        """The next record that this version knows, with its verified payload."""
        while True:
            record = read_record(self._source, self._offset)
            if record.seq != self._seq:
                raise corrupt(self, f"record {record.seq} where {self._seq} should be", self._offset)
            self._seq += 1
            self._offset = record.end
            if record.type in KNOWN_TYPES:
                self._offsets.setdefault(record.type, record.offset)
                return record, read_payload(self._source, record)
            skip_payload(self._source, record)

    def _read_regions(self) -> None:
        while True:
            record, payload = self._next()
            if record.type != b"REGN":
                raise corrupt(self, "the regions are missing", record.offset)
            self.regions += parse_regions(self._source, record, payload)
            if record.last_part:
                check_regions(self._source, self.regions)
                return

    def __iter__(self) -> Iterator[Pages]:
        while True:
            record, payload = self._next()
            if record.type == b"CHNK":
                yield from self._chunk(record, payload)
            elif record.type == b"VMST":
                name = self._vmstate.add(record)
                self._blobs.setdefault(name, []).append(payload)
            elif record.type == b"STAT":
                self.stats = parse_stats(self._source, record, payload)
            elif record.type == b"INDX":
                self._index(record, payload)
            elif record.type == b"TRLR":
                self._finish(record, payload)
                return
            else:
                raise corrupt(self, "regions in the wrong place", record.offset)

    def _chunk(self, record: Record, payload: bytes) -> Iterator[Pages]:
        number = self.index.count
        self.index.add(record.header + record.meta, record.offset)
        view = memoryview(payload)
        for page, pages, kind in self.index.map_of(number):
            size = pages * PAGE_BYTES if kind == DATA else 0
            yield Pages(page, pages, kind, view[:size])
            view = view[size:]

    def _index(self, record: Record, payload: bytes) -> None:
        if len(payload) != record.arg * INDEX_ENTRY_BYTES:
            raise corrupt(self, "the index has a wrong size", record.offset)
        self._listed_end, parts = self._listed.add_index(payload, self._listed_end, record.offset)
        self._listed_vmstate += len(parts)

    def _finish(self, record: Record, payload: bytes) -> None:
        trailer = parse_trailer(self._source, record, payload, self.header)
        parts = sum(map(len, self._vmstate.finish().values()))
        counts = (self.index.count, parts, self._listed_vmstate)
        if counts != (trailer.chunks, trailer.vmstate_parts, trailer.vmstate_parts):
            raise corrupt(self, "records and trailer contradict each other", record.offset)
        places = (self._offsets.get(b"STAT"), self._offsets.get(b"INDX"))
        if places != (trailer.stat_offset, trailer.indx_offset):
            raise corrupt(self, "the trailer's offsets are wrong", record.offset)
        if self.stats.get("image_bytes") != record.end:
            raise corrupt(self, "the figures state another size", trailer.stat_offset)
        if not self.index.same_as(self._listed):
            raise corrupt(self, "the index is not that of the chunks", trailer.indx_offset)
        if not self._source.at_end():
            raise corrupt(self, "bytes follow the trailer", self._offset)
        self.vmstate = {name: b"".join(blobs) for name, blobs in self._blobs.items()}

    def check_complete(self, region: ImageRegion) -> None:
        """After the last item: `ImageError` or `LostPagesError` unless every page of the region was there."""
        end = region.first_page + region.pages
        runs = self.index.resolve(region.first_page, end)
        gap = runs.first_gap(region.first_page, end)
        if gap is not None:
            raise ImageError(f"{self.name}: {page_text(region, gap)} is not in the image")
        lost = runs.first_of(LOST)
        if lost is not None:
            raise LostPagesError(f"{self.name}: {page_text(region, lost)} was lost at capture time")


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


def stream_image(file: BinaryIO) -> ImageStream:
    """Begin to read an image from a readable binary file object, such as a pipe."""
    return ImageStream(file)


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
