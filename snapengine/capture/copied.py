"""Writes the pages that were copied while an attached process was stopped. The engine does not see them."""

from __future__ import annotations

from dataclasses import dataclass

from snapengine.image.encode import DATA, HOLE, LOST, ZERO
from snapengine.image.writer import Writer
from snapengine.regions import PAGE_BYTES, Region
from snapengine.targets.base import Copied

CHUNK_PAGES = 256
_ZERO = bytes(PAGE_BYTES)


@dataclass(slots=True)
class CopiedCounts:
    """Memory that was copied beside the engine: bytes, and pages by what they hold."""

    bytes: int = 0
    data: int = 0
    zero: int = 0
    hole: int = 0
    lost: int = 0


def write_copied(
    writer: Writer,
    region: Region,
    first_page: int,
    copied: Copied | None,
    level: int | None,
    counts: CopiedCounts,
) -> None:
    """Write one region whose pages begin at number `first_page`; `copied` None: all of it is lost.

    Adds to `counts` what the pages hold.
    """
    pages = -(-region.length // PAGE_BYTES)
    counts.bytes += region.length
    if copied is None:
        counts.lost += pages
        writer.py_chunk([(first_page, pages, LOST)])
        return
    gaps: list[tuple[int, int, int]] = []
    at = 0
    done = [(page, len(data) // PAGE_BYTES) for page, data in copied.runs]
    done += [(page, 1) for page in copied.unreadable]
    for page, count in sorted(done):
        if page > at:
            gaps.append((first_page + at, page - at, HOLE))
            counts.hole += page - at
        at = page + count
    if at < pages:
        gaps.append((first_page + at, pages - at, HOLE))
        counts.hole += pages - at
    gaps += [(first_page + page, 1, LOST) for page in copied.unreadable]
    counts.lost += len(copied.unreadable)
    for start in range(0, len(gaps), CHUNK_PAGES):
        writer.py_chunk(gaps[start : start + CHUNK_PAGES])
    for page, data in copied.runs:
        _write_run(writer, first_page + page, data, level, counts)


def _write_run(writer: Writer, first_page: int, data: bytes, level: int | None, counts: CopiedCounts) -> None:
    pages = len(data) // PAGE_BYTES
    for start in range(0, pages, CHUNK_PAGES):
        entries = []
        payload = bytearray()
        for number in range(start, min(start + CHUNK_PAGES, pages)):
            page = data[number * PAGE_BYTES : (number + 1) * PAGE_BYTES]
            kind = ZERO if page == _ZERO else DATA
            entries.append((first_page + number, 1, kind))
            if kind == DATA:
                payload += page
                counts.data += 1
            else:
                counts.zero += 1
        writer.py_chunk(entries, bytes(payload), level=level)
