"""Pages that were copied while an attached process stood: into the image, beside what the engine saved."""

from __future__ import annotations

from snapengine.packing import DATA, LOST, ZERO
from snapengine.tally import Extra
from snapengine.targets import PAGE_BYTES, Region
from snapengine.writer import Writer

CHUNK_PAGES = 256
_ZERO = bytes(PAGE_BYTES)


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
