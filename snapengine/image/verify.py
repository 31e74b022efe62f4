"""Verification of a whole image: checksums, completeness, and consistency of records and index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from snapengine.image.encode import ZSTD
from snapengine.image.headers import Record, Trailer
from snapengine.image.index import PageIndex
from snapengine.image.input import Named, corrupt, truncated
from snapengine.image.records import FILE_HEADER, read_payload, read_record
from snapengine.image.rules import KNOWN_TYPES, Order
from snapengine.image.sections import ImageRegion, page_text
from snapengine.storage.source import Source


class Verifiable(Named, Protocol):
    """The members of an image file that verification uses."""

    regions: list[ImageRegion]
    index: PageIndex
    trailer: Trailer

    @property
    def source(self) -> Source: ...

    @property
    def stats(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The content of a valid image. Pages have 4096 bytes; each is counted once, by its newest record."""

    records: int
    chunks: int
    file_bytes: int
    region_bytes: int
    data_pages: int
    zero_pages: int
    hole_pages: int
    lost_pages: int
    """Pages that the capture reported as lost: reading them raises `LostPagesError`."""
    duplicate_pages: int
    """Data pages that a later record supersedes."""
    vmstate_bytes: int


def verify_image(image: Verifiable) -> VerifyReport:
    """Check the checksums, the order of the records, the index, and that no page is missing.

    Raises
    ------
    CorruptImageError, TruncatedImageError
        On the first error; ``offset`` is its location.
    """
    vmstate_bytes = _verify_records(image)
    return report_of(
        image, image.regions, image.index, records=image.trailer.records, file_bytes=image.source.size,
        vmstate_bytes=vmstate_bytes,
    )  # fmt: skip


def report_of(
    where: Named, regions: Sequence[ImageRegion], index: PageIndex, *, records: int, file_bytes: int,
    vmstate_bytes: int,
) -> VerifyReport:  # fmt: skip
    """Count the pages of the regions. Raises `CorruptImageError` if one is missing."""
    totals = [0, 0, 0, 0]
    for region in regions:
        totals = [sum(pair) for pair in zip(totals, _pages_of(where, region, index), strict=True)]
    return VerifyReport(
        records=records,
        chunks=index.count,
        file_bytes=file_bytes,
        region_bytes=sum(region.length for region in regions),
        data_pages=totals[0],
        zero_pages=totals[1],
        hole_pages=totals[2],
        lost_pages=totals[3],
        duplicate_pages=index.data_pages() - totals[0],
        vmstate_bytes=vmstate_bytes,
    )


def _verify_records(image: Verifiable) -> int:
    """Verify all records in file order. Returns the number of vmstate bytes."""
    order = Order(image.source)
    offset = FILE_HEADER.size
    vmstate_bytes = 0
    while not order.done:
        record = read_record(image.source, offset)
        order.check(record)
        if record.type == b"CHNK":
            image.index.check(order.counts[b"CHNK"] - 1, record.header + record.meta, offset)
        elif record.type == b"VMST":
            vmstate_bytes += record.raw_bytes
        _verify_payload(image.source, record)
        offset = record.end
    order.check_trailer(image.trailer, image.stats)
    if offset != image.source.size:
        raise corrupt(image, "bytes follow the trailer", offset)
    return vmstate_bytes


def _verify_payload(source: Source, record: Record) -> None:
    if record.type in KNOWN_TYPES and record.encoding == ZSTD:
        read_payload(source, record)
        return
    crc = source.checksum(record.payload_offset, record.stored_bytes)
    text = record.type.decode("ascii", "backslashreplace")
    if crc is None:
        raise truncated(source, f"ends inside {text}", record.offset)
    if crc != record.payload_crc:
        raise corrupt(source, f"the payload checksum of {text} does not match", record.offset)


def _pages_of(where: Named, region: ImageRegion, index: PageIndex) -> list[int]:
    """Number of pages of each kind."""
    end = region.first_page + region.pages
    runs = index.resolve(region.first_page, end)
    gap = runs.first_gap(region.first_page, end)
    if gap is not None:
        raise corrupt(where, f"{page_text(region, gap)} is missing")
    return runs.totals()
