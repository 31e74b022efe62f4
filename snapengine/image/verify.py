"""The whole image, byte by byte: is everything there, is it what was written, does it fit together?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapengine.base.fileio import crc_of_range
from snapengine.image.encode import ZSTD
from snapengine.image.records import FILE_HEADER, Record, read_payload, read_record
from snapengine.image.rules import KNOWN_TYPES, Order
from snapengine.image.sections import ImageRegion, page_text
from snapengine.storage.sources import FileSource, corrupt, truncated

if TYPE_CHECKING:
    from snapengine.image import Image


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a sound image holds. Pages are 4096 bytes, each counted once, as its newest record has it."""

    records: int
    chunks: int
    file_bytes: int
    region_bytes: int
    data_pages: int
    zero_pages: int
    hole_pages: int
    lost_pages: int
    """Pages that the capture reports as lost: reading them raises `LostPagesError`."""
    duplicate_pages: int
    """Data pages that a later record supersedes."""
    vmstate_bytes: int


def verify_image(image: Image) -> VerifyReport:
    """Check every record's checksums, the sequence, the index, and that every page is there.

    Raises
    ------
    CorruptImageError, TruncatedImageError
        The first thing found wrong; ``offset`` is where.
    """
    vmstate_bytes = _verify_records(image)
    totals = [0, 0, 0, 0]
    for region in image.regions:
        totals = [sum(pair) for pair in zip(totals, _verify_region(image, region), strict=True)]
    return VerifyReport(
        records=image.trailer.records,
        chunks=image.index.count,
        file_bytes=image.source.size,
        region_bytes=sum(region.length for region in image.regions),
        data_pages=totals[0],
        zero_pages=totals[1],
        hole_pages=totals[2],
        lost_pages=totals[3],
        duplicate_pages=image.index.data_pages() - totals[0],
        vmstate_bytes=vmstate_bytes,
    )


def _verify_records(image: Image) -> int:
    """Every record in the order of the file; returns the bytes of vmstate."""
    order = Order(image.source)
    offset = FILE_HEADER.size
    vmstate_bytes = 0
    while not order.done:
        record = read_record(image.source, offset)
        order.take(record)
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


def _verify_payload(source: FileSource, record: Record) -> None:
    if record.type in KNOWN_TYPES and record.encoding == ZSTD:
        read_payload(source, record)
        return
    crc = crc_of_range(source.fd, record.payload_offset, record.stored_bytes)
    text = record.type.decode("ascii", "backslashreplace")
    if crc is None:
        raise truncated(source, f"ends inside of {text}", record.offset)
    if crc != record.payload_crc:
        raise corrupt(source, f"the payload's checksum of {text} does not match", record.offset)


def _verify_region(image: Image, region: ImageRegion) -> list[int]:
    """Pages of each kind."""
    runs = image.resolve(region, 0, region.length)
    gap = runs.first_gap(region.first_page, region.first_page + region.pages)
    if gap is not None:
        raise corrupt(image, f"{page_text(region, gap)} is missing")
    return runs.totals()
