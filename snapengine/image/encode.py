"""Encoding of regions, blobs and statistics for `pyx/image/writer`, which calls it a few times per image.

Nothing here runs per chunk.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import zstandard

from snapengine.base.names import encode as encode_name
from snapengine.image.region_pack import numbers_ascend, pack_regions
from snapengine.regions import KINDS, PAGE_BYTES, Region

PART_BYTES = 1 << 20
NAME_BYTES = 4096
MAX_PAGES = 1 << 40
HUGE_MAX_BYTES = 1 << 30  # hugetlb pages of x86-64 have 2 MiB or 1 GiB
DATA, ZERO, HOLE, LOST = range(4)
RAW, ZSTD = range(2)
REGION = struct.Struct("<QQQIHH")
STATS_MAX_BYTES = 3 << 20  # a record holds 4 MiB
CUT = "lost_runs is truncated: there are too many to list; the page maps have all of them"
PLACEHOLDER = 2**63  # has as many digits as the largest size of an image


def region_pages(addr: int, length: int) -> int:
    """Pages touched by [addr, addr + length)."""
    return -(-(addr % PAGE_BYTES + length) // PAGE_BYTES)


def page_size_fits(kind: str, page_size: int) -> bool:
    """Whether a region of this kind can have pages of this size (FORMAT.md)."""
    if not kind.startswith("hugetlb"):
        return page_size == PAGE_BYTES
    return PAGE_BYTES < page_size <= HUGE_MAX_BYTES and page_size & (page_size - 1) == 0


def region_entries(regions: Sequence[tuple[Region, int]]) -> list[bytes]:
    """The bytes of each region in a REGN record. ValueError: one is malformed, or page numbers overlap."""
    if not numbers_ascend(regions):
        _refuse_shared_numbers(regions)
    return pack_regions(regions, _region_entry)


def _refuse_shared_numbers(regions: Sequence[tuple[Region, int]]) -> None:
    taken = sorted((first, first + region_pages(r.addr, r.length), r.name) for r, first in regions)
    for (_, end, name), (first, _, other) in itertools.pairwise(taken):
        if first < end:
            raise ValueError(f"regions {name!r} and {other!r} share page number {first}")


def _region_entry(region: Region, first_page: int) -> bytes:
    name = encode_name(region.name)
    pages = region_pages(region.addr, region.length)
    if region.length <= 0 or region.addr < 0 or region.addr + region.length > 1 << 64:
        raise ValueError(f"region {region.name!r}: is empty, or outside the address space")
    if first_page < 0 or first_page + pages > MAX_PAGES:
        raise ValueError(f"region {region.name!r}: its page numbers exceed 2^40")
    if len(name) > NAME_BYTES:
        raise ValueError(f"region {region.name[:80]!r}: the name is longer than {NAME_BYTES} bytes")
    if b"\0" in name:
        raise ValueError(f"region {region.name[:80]!r}: the name contains a NUL")
    if region.kind not in KINDS:
        raise ValueError(f"region {region.name!r}: kind {region.kind!r} is none of {', '.join(KINDS)}")
    if not page_size_fits(region.kind, region.page_size):
        raise ValueError(f"region {region.name!r}: page size {region.page_size} is invalid for {region.kind}")
    head = (region.addr, region.length, first_page, region.page_size, KINDS.index(region.kind), len(name))
    return REGION.pack(*head) + name


def region_parts(entries: Sequence[bytes]) -> Iterator[tuple[bytes, int, bool]]:
    """(payload, number of entries, is last) of each REGN record; one empty part if there is no region."""
    part: list[bytes] = []
    room = PART_BYTES
    for entry in entries:
        if len(entry) > room:
            yield b"".join(part), len(part), False
            part, room = [], PART_BYTES
        part.append(entry)
        room -= len(entry)
    yield b"".join(part), len(part), True


def blob_parts(source: Any) -> Iterator[tuple[bytes | memoryview, bool]]:
    """(part, is last) of a bytes-like object or of a readable file; one empty part if it is empty."""
    blocks = _read_blocks(source) if hasattr(source, "read") else _slices(memoryview(source).cast("B"))
    previous: bytes | memoryview | None = None
    for block in blocks:
        if previous is not None:
            yield previous, False
        previous = block
    yield b"" if previous is None else previous, True


def _slices(view: memoryview) -> Iterator[memoryview]:
    return (view[start : start + PART_BYTES] for start in range(0, len(view), PART_BYTES))


def _read_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Read full blocks, except for the last; a read of a pipe may return less."""
    block = bytearray()
    while data := file.read(PART_BYTES - len(block)):
        block += data
        if len(block) == PART_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def encode(data: bytes | memoryview, level: int | None) -> tuple[bytes | memoryview, int]:
    """(payload, encoding): a zstd frame if a level is given and the frame is smaller than the data."""
    if level is not None:
        frame = zstandard.ZstdCompressor(level=level).compress(data)
        if len(frame) < len(data):
            return frame, ZSTD
    return data, RAW


def pack_entry(page: int, pages: int, kind: int) -> int:
    """One page-map entry (format.h). Raises ValueError if a field is out of range."""
    if page < 0 or not 1 <= pages <= 1 << 22 or page + pages > MAX_PAGES or kind not in range(4):
        raise ValueError(f"chunk: page-map entry {(page, pages, kind)} is out of range")
    return page | (pages - 1) << 40 | kind << 62


def stats_text(stats: dict[str, Any], bytes_around: int) -> bytes:
    """`stats` as JSON, with "image_bytes" set to `bytes_around` plus the length of the text.

    The text is padded with spaces to a length that does not depend on "image_bytes". A list of lost runs that
    is too long for one record is truncated, with a warning: the page maps have all of them.
    """
    while len(json.dumps(stats)) > STATS_MAX_BYTES and stats.get("lost_runs"):
        stats["lost_runs"] = stats["lost_runs"][: len(stats["lost_runs"]) // 2]
        stats["warnings"] = [w for w in stats.get("warnings", ()) if w != CUT] + [CUT]
    length = len(json.dumps({**stats, "image_bytes": PLACEHOLDER}))
    stats["image_bytes"] = bytes_around + length
    return json.dumps(stats).ljust(length).encode("ascii")
