"""What verified records say: the regions, the vmstate, the figures, the trailer. Parsed from Python."""

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
from snapengine.image.result_fields import check_figures
from snapengine.image.rules import INDEX_ENTRY_BYTES, check_region
from snapengine.regions import KINDS, PAGE_BYTES

TRAILER = struct.Struct("<QQQQQQQ16s")
TRAILER_RECORD_BYTES = RECORD.size + TRAILER.size


@dataclass(frozen=True, slots=True)
class ImageRegion:
    """One region of an image: ``addr`` and ``length`` in bytes of the target's address space."""

    name: str
    addr: int
    length: int
    page_size: int
    kind: str
    first_page: int
    """Number of its first page in the image's page numbering."""

    @property
    def pages(self) -> int:
        """Pages of 4096 bytes that it touches."""
        return region_pages(self.addr, self.length)

    @property
    def start_byte(self) -> int:
        """Where it begins when all the image's pages are laid out by number."""
        return self.first_page * PAGE_BYTES + self.addr % PAGE_BYTES


def page_text(region: ImageRegion, page: int) -> str:
    """Which page of the region, in words."""
    offset = max(page * PAGE_BYTES - region.start_byte, 0)
    return f"region {region.name!r}: the page at offset {offset:#x} (address {region.addr + offset:#x})"


def parse_trailer(source: Input, record: Record, payload: bytes, header: FileHeader) -> Trailer:
    """The trailer, checked against the file header and its own place in the file."""
    if len(payload) != TRAILER.size:
        raise corrupt(source, "the trailer has a wrong size", record.offset)
    trailer = Trailer(*TRAILER.unpack(payload))
    if trailer.image_id != header.image_id:
        raise corrupt(source, "the trailer belongs to another image", record.offset)
    if trailer.image_bytes != record.end or trailer.records != record.seq + 1:
        raise corrupt(source, "the trailer is not where it says it is", record.offset)
    offsets = (trailer.regn_offset, trailer.stat_offset, trailer.indx_offset, record.offset)
    if trailer.regn_offset != FILE_HEADER.size or list(offsets) != sorted(set(offsets)):
        raise corrupt(source, "the trailer's offsets are impossible", record.offset)
    return trailer


def parse_regions(source: Input, record: Record, payload: bytes) -> Iterator[ImageRegion]:
    """The regions in one REGN record."""
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
    """No page number belongs to two regions."""
    taken = sorted((region.first_page, region.first_page + region.pages) for region in regions)
    for (_, end), (first, _) in itertools.pairwise(taken):
        if first < end:
            raise corrupt(source, f"two regions share page number {first}", FILE_HEADER.size)


def text_of(source: Input, record: Record, name: bytes) -> str:
    """A name of at most 4096 bytes, none of them a NUL."""
    if len(name) > NAME_BYTES or b"\0" in name:
        raise corrupt(source, "a name is too long, or holds a NUL", record.offset)
    return decode(name)


class VmStateParts:
    """Puts the parts of vmstate blobs together: in order, without a gap, no name twice."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self._parts: dict[str, list[Record]] = {}

    def add(self, record: Record) -> str:
        """Take the next VMST record; returns its name."""
        name = text_of(self._source, record, record.meta)
        parts = self._parts.setdefault(name, [])
        if record.arg != len(parts) or (parts and parts[-1].last_part):
            raise corrupt(self._source, f"vmstate {name[:80]!r} is out of order", record.offset)
        parts.append(record)
        return name

    def finish(self) -> dict[str, list[Record]]:
        """Every blob's records, all complete."""
        for name, parts in self._parts.items():
            if not parts[-1].last_part:
                raise corrupt(self._source, f"vmstate {name[:80]!r} has no end", parts[-1].offset)
        return self._parts


def parse_index(source: Input, record: Record, payload: bytes) -> bytes:
    """The entries in one INDX record, after their number was checked."""
    if len(payload) != record.arg * INDEX_ENTRY_BYTES:
        raise corrupt(source, "the index has a wrong size", record.offset)
    return payload


def parse_stats(source: Any, record: Record, payload: bytes) -> dict[str, Any]:
    """The JSON object of a STAT record. Members that `Result` has are of its types; all may be missing."""
    try:
        fields = parse_object(payload)
        check_figures(fields)
    except ValueError as error:
        raise corrupt(source, f"the figures: {error}", record.offset) from None
    return fields.members
