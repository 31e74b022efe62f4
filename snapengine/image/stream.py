"""Sequential reading of images from a pipe, with the checks of `Image.verify` in one pass."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, Self

from snapengine.errors import ImageError, LostPagesError
from snapengine.image.describe import SizedBlobs, describe
from snapengine.image.encode import DATA, LOST
from snapengine.image.headers import Record
from snapengine.image.index import PageIndex
from snapengine.image.input import corrupt
from snapengine.image.records import (
    FILE_HEADER,
    decode_payload,
    read_file_header,
    read_record,
    read_stored_payload,
    skip_payload,
)
from snapengine.image.rules import KNOWN_TYPES, Order, VmstateEntry, check_vmstate_entry
from snapengine.image.sections import (
    ImageRegion,
    VmStateParts,
    check_regions,
    page_text,
    parse_index,
    parse_regions,
    parse_stats,
    parse_trailer,
)
from snapengine.image.verify import VerifyReport, report_of
from snapengine.regions import PAGE_BYTES
from snapengine.storage.stream_source import StreamSource

__all__ = ["ImageStream", "Pages", "stream_image"]


class Pages(NamedTuple):
    """One run of a chunk, in file order. A later run replaces an earlier one."""

    page: int
    """Page number in the page numbering of the image (see `ImageRegion.first_page`)."""
    pages: int
    kind: int
    """0 data, 1 zero, 2 hole, 3 lost."""
    data: memoryview
    """`pages` * 4096 bytes for data, else empty."""


class StreamVmState(SizedBlobs):
    """The named blobs of a stream, verified. They are kept as stored and decompressed on access, so that they
    need no more memory than they occupy in the stream."""

    def __init__(self) -> None:
        self._stored: dict[str, list[tuple[Record, bytes]]] = {}

    def add(self, name: str, record: Record, stored: bytes) -> None:
        """Add the next part of a blob."""
        self._stored.setdefault(name, []).append((record, stored))

    def __getitem__(self, name: str) -> bytes:
        return b"".join(decode_payload(self, record, stored) for record, stored in self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def name(self) -> str:
        """The name for messages."""
        return "vmstate"

    def sizes(self) -> dict[str, int]:
        """Bytes of each blob, without decoding it."""
        return {name: sum(part.raw_bytes for part, _ in parts) for name, parts in self._stored.items()}


class ImageStream:
    """An image that is read sequentially. Only iteration to the end establishes that it is complete.

    `regions` and `id` are available at once, `vmstate` (name -> bytes) and `stats` after the last item. The
    file object remains the caller's. It must end with the trailer.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._source = StreamSource(file)
        self.header = read_file_header(self._source)
        self.id = uuid.UUID(bytes=self.header.image_id)
        self.regions: list[ImageRegion] = []
        self.vmstate = StreamVmState()
        self.stats: dict[str, Any] = {}
        self.index = PageIndex(self._source.name)
        self._order = Order(self._source)
        self._offset = FILE_HEADER.size
        self._records = 0
        self._parts = VmStateParts(self._source)
        self._vmst: list[Record] = []
        self._listed = PageIndex(self._source.name)
        self._listed_end = 0
        self._listed_vmst: list[VmstateEntry] = []
        self._read_regions()

    @property
    def name(self) -> str:
        """The stream's name, for messages."""
        return self._source.name

    def _next(self) -> tuple[Record, bytes]:
        """The next record of a known type, with its verified payload."""
        while True:
            record = read_record(self._source, self._offset)
            self._order.check(record)
            self._records += 1
            self._offset = record.end
            if record.type in KNOWN_TYPES:
                return record, read_stored_payload(self._source, record)
            skip_payload(self._source, record)

    def _read_regions(self) -> None:
        while True:
            record, stored = self._next()
            self.regions += parse_regions(self._source, record, decode_payload(self._source, record, stored))
            if record.last_part:
                check_regions(self._source, self.regions)
                return

    def __iter__(self) -> Iterator[Pages]:
        while not self._order.done:
            record, stored = self._next()
            payload = decode_payload(self._source, record, stored)
            if record.type == b"CHNK":
                yield from self._chunk(record, payload)
            elif record.type == b"VMST":
                self._vmst.append(record)
                self.vmstate.add(self._parts.add(record), record, stored)
            elif record.type == b"STAT":
                self.stats = parse_stats(self._source, record, payload)
                self._listed_end = self._order.memory_start
            elif record.type == b"INDX":
                self._index(record, payload)
            elif record.type == b"TRLR":
                self._finish(record, payload)

    def _chunk(self, record: Record, payload: bytes) -> Iterator[Pages]:
        number = self.index.count
        self.index.add(record.header + record.meta, record.offset)
        view = memoryview(payload)
        for page, pages, kind in self.index.map_of(number):
            size = pages * PAGE_BYTES if kind == DATA else 0
            yield Pages(page, pages, kind, view[:size])
            view = view[size:]

    def _index(self, record: Record, payload: bytes) -> None:
        entries = parse_index(self._source, record, payload)
        limit = self._order.first[b"STAT"]
        self._listed_end, parts = self._listed.add_index(entries, self._listed_end, limit)
        self._listed_vmst += map(VmstateEntry._make, parts)

    def _finish(self, record: Record, payload: bytes) -> None:
        trailer = parse_trailer(self._source, record, payload, self.header)
        self._order.check_trailer(trailer, self.stats)
        self._parts.finish()
        if not self.index.same_as(self._listed) or len(self._vmst) != len(self._listed_vmst):
            raise corrupt(self, "the index does not match the records", trailer.indx_offset)
        for found, listed in zip(self._vmst, self._listed_vmst, strict=True):
            check_vmstate_entry(self._source, found, listed)
        if not self._source.at_end():
            raise corrupt(self, "bytes follow the trailer", self._offset)

    def read_to_end(self) -> Self:
        """Read and verify the rest of the stream. Raises ImageError."""
        for _ in self:
            pass
        return self

    def info(self) -> dict[str, Any]:
        """As `Image.info`, without the fields that need random access. Call it after the last item."""
        return {
            **describe(self.header, self.regions, self.vmstate.sizes()),
            "file_bytes": self.stats["image_bytes"],
            "chunks": self.index.count,
            "stats": self.stats,
        }

    def verify(self) -> VerifyReport:
        """Check that no page is missing, and report the content. Call it after the last item."""
        return report_of(
            self, self.regions, self.index, records=self._records, file_bytes=self.stats["image_bytes"],
            vmstate_bytes=sum(self.vmstate.sizes().values()),
        )  # fmt: skip

    def check_complete(self, region: ImageRegion) -> None:
        """Raise `ImageError` or `LostPagesError` for an incomplete region. Call it after the last item."""
        end = region.first_page + region.pages
        runs = self.index.resolve(region.first_page, end)
        gap = runs.first_gap(region.first_page, end)
        if gap is not None:
            raise ImageError(f"{self.name}: {page_text(region, gap)} is not in the image")
        lost = runs.first_of(LOST)
        if lost is not None:
            raise LostPagesError(f"{self.name}: {page_text(region, lost)} was lost at capture time")


def stream_image(file: BinaryIO) -> ImageStream:
    """Read the header and the regions of an image from a readable binary file object, such as a pipe."""
    return ImageStream(file)
