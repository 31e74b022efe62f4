"""Parsing of verified records: regions, vmstate, statistics, trailer."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from snapengine.base.jsonfields import parse_object
from snapengine.base.names import decode
from snapengine.image.encode import NAME_BYTES, REGION, region_pages
from snapengine.image.headers import FileHeader, Record, Trailer
from snapengine.image.input import Input, corrupt
from snapengine.image.records import FILE_HEADER, RECORD
from snapengine.image.result_fields import check_statistics
from snapengine.image.rules import INDEX_ENTRY_BYTES, check_region
from snapengine.regions import KINDS, PAGE_BYTES

TRAILER = struct.Struct("<QQQQQQQ16s")
TRAILER_RECORD_BYTES = RECORD.size + TRAILER.size


@dataclass(frozen=True, slots=True)
class ImageRegion:
    """One region of an image: ``addr`` and ``length`` in bytes, in the address space of the target."""

    name: str
    addr: int
    length: int
    page_size: int
    kind: str
    first_page: int
    """Number of its first page in the page numbering of the image."""

    @property
    def pages(self) -> int:
        """Number of pages of 4096 bytes that it overlaps."""
        return region_pages(self.addr, self.length)

    @property
    def start_byte(self) -> int:
        """Offset of its first byte when the pages of the image are laid out by number."""
        return self.first_page * PAGE_BYTES + self.addr % PAGE_BYTES


def page_text(region: ImageRegion, page: int) -> str:
    """Description of a page of the region, for messages."""
    offset = max(page * PAGE_BYTES - region.start_byte, 0)
    return f"region {region.name!r}: the page at offset {offset:#x} (address {region.addr + offset:#x})"


def parse_trailer(source: Input, record: Record, payload: bytes, header: FileHeader) -> Trailer:
    """Parse the trailer; check it against the file header and its offset in the file."""
    if len(payload) != TRAILER.size:
        raise corrupt(source, "the trailer has an invalid size", record.offset)
    trailer = Trailer(*TRAILER.unpack(payload))
    if trailer.image_id != header.image_id:
        raise corrupt(source, "the trailer belongs to another image", record.offset)
    if trailer.image_bytes != record.end or trailer.records != record.seq + 1:
        raise corrupt(source, "the trailer does not match its offset and sequence number", record.offset)
    offsets = (trailer.regn_offset, trailer.stat_offset, trailer.indx_offset, record.offset)
    if trailer.regn_offset != FILE_HEADER.size or list(offsets) != sorted(set(offsets)):
        raise corrupt(source, "the offsets in the trailer are invalid", record.offset)
    return trailer


def parse_regions(source: Input, record: Record, payload: bytes) -> Iterator[ImageRegion]:
    """Parse the regions of one REGN record."""
    position = 0
    for _ in range(record.arg):
        if position + REGION.size > len(payload):
            raise corrupt(source, "the regions do not fit their record", record.offset)
        addr, length, first_page, page_size, kind, name_bytes = REGION.unpack_from(payload, position)
        position += REGION.size
        name = payload[position : position + name_bytes]
        position += name_bytes
        check_region(source, record.offset, addr, length, first_page, page_size, kind)
        yield ImageRegion(text_of(source, record, name), addr, length, page_size, KINDS[kind], first_page)
    if position != len(payload):
        raise corrupt(source, "the regions do not fit their record", record.offset)


def check_regions(source: Input, regions: list[ImageRegion]) -> None:
    """Raise `CorruptImageError` if two regions share a page number."""
    taken = sorted((region.first_page, region.first_page + region.pages) for region in regions)
    for (_, end), (first, _) in itertools.pairwise(taken):
        if first < end:
            raise corrupt(source, f"two regions share page number {first}", FILE_HEADER.size)


def text_of(source: Input, record: Record, name: bytes) -> str:
    """Decode a name, which may have at most 4096 bytes and no NUL."""
    if len(name) > NAME_BYTES or b"\0" in name:
        raise corrupt(source, "a name is too long, or contains a NUL", record.offset)
    return decode(name)


class VmStateParts:
    """Collects the parts of vmstate blobs. They must be in order and complete, with unique names."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._parts: dict[str, list[Record]] = {}

    def add(self, record: Record) -> str:
        """Add the next VMST record. Returns the name of its blob."""
        name = text_of(self._source, record, record.meta)
        parts = self._parts.setdefault(name, [])
        if record.arg != len(parts) or (parts and parts[-1].last_part):
            raise corrupt(self._source, f"vmstate {name[:80]!r} has a part out of order", record.offset)
        parts.append(record)
        return name

    def finish(self) -> dict[str, list[Record]]:
        """Check that all blobs are complete. Returns their records."""
        for name, parts in self._parts.items():
            if not parts[-1].last_part:
                raise corrupt(self._source, f"vmstate {name[:80]!r} has no last part", parts[-1].offset)
        return self._parts


def parse_index(source: Input, record: Record, payload: bytes) -> bytes:
    """The entries of one INDX record, after a check of their number."""
    if len(payload) != record.arg * INDEX_ENTRY_BYTES:
        raise corrupt(source, "the index has an invalid size", record.offset)
    return payload


def parse_stats(source: Any, record: Record, payload: bytes) -> dict[str, Any]:
    """Parse the JSON object of a STAT record. Members of `Result` must have its types; all are optional."""
    try:
        fields = parse_object(payload)
        check_statistics(fields)
    except ValueError as error:
        raise corrupt(source, f"the statistics: {error}", record.offset) from None
    return fields.members
