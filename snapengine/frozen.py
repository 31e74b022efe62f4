"""Pages that were copied while an attached process stood: into the image, beside what the engine saved."""

from __future__ import annotations

import os

from snapengine.packing import DATA, LOST, ZERO
from snapengine.tally import Extra
from snapengine.targets import PAGE_BYTES, Region
from snapengine.writer import Writer

CHUNK_PAGES = 256
_ZERO = bytes(PAGE_BYTES)


def copy_frozen(pid: int, regions: list[Region]) -> list[bytes | None]:
    """The bytes of each region of a process that stands still; None: not readable. Raises OSError."""
    if not regions:
        return []
    copies: list[bytes | None] = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for region in regions:
            try:
                data = os.pread(memory.fileno(), region.length, region.addr)
            except OSError:
                data = b""  # it becomes lost pages, and is reported
            copies.append(data if len(data) == region.length else None)
    return copies


def write_frozen(
    writer: Writer, region: Region, first_page: int, data: bytes | None, level: int | None, extra: Extra
) -> None:
    """Write one region whose pages begin at number `first_page`; `data` None: all of it is lost.

    Adds to `extra` what the pages hold.
    """
    pages = -(-region.length // PAGE_BYTES)
    extra.bytes += region.length
    if data is None:
        extra.lost += pages
        writer.py_chunk([(first_page, pages, LOST)])
        return
    for start in range(0, pages, CHUNK_PAGES):
        entries = []
        payload = bytearray()
        for number in range(start, min(start + CHUNK_PAGES, pages)):
            page = data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
            kind = ZERO if page == _ZERO else DATA
            entries.append((first_page + number, 1, kind))
            if kind == DATA:
                payload += page
                extra.data += 1
            else:
                extra.zero += 1
        writer.py_chunk(entries, bytes(payload), level=level)
