"""The rules of FORMAT.md, shared by the reader of files and the reader of pipes.

Both call the same functions with the same records in the same order, so they accept the same images. The
functions here do not read: their arguments come from headers and payloads whose checksums are verified.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from snapengine.errors import UnsupportedVersionError
from snapengine.image.encode import MAX_PAGES, NAME_BYTES, PART_BYTES, RAW, ZSTD, page_size_fits, region_pages
from snapengine.image.headers import LAST_PART, Record, Trailer
from snapengine.image.input import Named, corrupt
from snapengine.regions import KINDS

MAJOR = 1
FEATURES = 0
HEADER_BYTES = 64
RECORD_BYTES = 48
TRAILER_BYTES = 72
INDEX_ENTRY_BYTES = 40
MAY_IGNORE = 1 << 15
CHUNK_MAX_BYTES = 4 << 20
META_MAX_BYTES = 256 << 10
PADDING_MAX_BYTES = 63
UNKNOWN_MAX_BYTES = 1 << 62
MULTIPART = (b"REGN", b"VMST", b"INDX")
"""Records that are divided into parts; the last part has a flag."""
KNOWN_TYPES = (b"REGN", b"CHNK", b"VMST", b"PADD", b"STAT", b"INDX", b"TRLR")
_NEXT_STAGE: dict[str, dict[bytes, str]] = {
    "regions": {b"REGN": "regions"},
    "memory": {b"CHNK": "memory", b"VMST": "memory", b"PADD": "memory", b"STAT": "statistics"},
    "statistics": {b"INDX": "index"},
    "index": {b"INDX": "index"},
    "end": {b"TRLR": "done"},
    "done": {},
}
_AFTER_LAST_PART = {"regions": "memory", "index": "end"}
_UNKNOWN_ALLOWED = ("memory", "statistics", "end")


def check_file_header(where: Named, version: tuple[int, int], header_bytes: int, features: int,
                      reserved: int) -> None:  # fmt: skip
    """Raise `ImageError` unless this version can read an image with these file header fields."""
    major, minor = version
    if major != MAJOR:
        raise UnsupportedVersionError(f"{where.name}: format version {major}; this program reads {MAJOR}")
    if features & ~FEATURES:
        raise UnsupportedVersionError(f"{where.name}: requires features {features:#x} that are unknown here")
    if header_bytes != HEADER_BYTES:
        raise corrupt(where, f"the file header states {header_bytes} bytes instead of {HEADER_BYTES}", 0)
    if reserved and not minor:  # a later minor version may use it
        raise corrupt(where, "the file header's reserved field is not 0", 0)


def check_record(where: Named, record: Record) -> None:
    """Raise `ImageError` unless a record, by itself, is valid for its type."""
    text = record.type.decode("ascii", "backslashreplace")
    if record.type not in KNOWN_TYPES:
        if not record.flags & MAY_IGNORE:
            raise UnsupportedVersionError(f"{where.name}: unknown record {text!r}", record.offset)
        if record.stored_bytes > UNKNOWN_MAX_BYTES:
            raise corrupt(where, f"record {text!r} has an invalid size", record.offset)
        return
    if record.flags & ~(LAST_PART | MAY_IGNORE) or record.encoding not in (RAW, ZSTD):
        text += " uses an unknown encoding or flag"
        raise UnsupportedVersionError(f"{where.name}: {text}", record.offset)
    if record.flags & LAST_PART and record.type not in MULTIPART:
        raise corrupt(where, f"{text} has the flag of a last part, but has no parts", record.offset)
    if not _sizes_fit(record):
        raise corrupt(where, f"{text} has invalid sizes", record.offset)
    if not _meta_fits(record):
        raise corrupt(where, f"{text} has a meta of an invalid size, {len(record.meta)} bytes",
                      record.offset)  # fmt: skip
    if record.type == b"PADD" and (record.flags != MAY_IGNORE or record.arg or any(record.meta)):
        raise corrupt(where, "PADD has an invalid flag, argument or content", record.offset)


def _sizes_fit(record: Record) -> bool:
    limit = {b"CHNK": CHUNK_MAX_BYTES, b"STAT": CHUNK_MAX_BYTES, b"TRLR": TRAILER_BYTES, b"PADD": 0}
    if record.raw_bytes > limit.get(record.type, PART_BYTES):
        return False
    if record.type == b"TRLR" and record.stored_bytes != TRAILER_BYTES:  # found from the end of the file
        return False
    if record.encoding == ZSTD:
        return 0 < record.stored_bytes < record.raw_bytes and record.type != b"TRLR"
    return record.stored_bytes == record.raw_bytes


def _meta_fits(record: Record) -> bool:
    size = len(record.meta)
    if record.type == b"CHNK":
        return size > 0 and size % 8 == 0
    if record.type == b"VMST":
        return 0 < size <= NAME_BYTES
    return size <= (PADDING_MAX_BYTES if record.type == b"PADD" else 0)


def check_region(where: Named, offset: int, addr: int, length: int, first_page: int, page_size: int,
                 kind: int) -> None:  # fmt: skip
    """Raise `ImageError` unless the fields of a region, in the record at `offset`, are valid."""
    if kind >= len(KINDS):
        raise UnsupportedVersionError(f"{where.name}: unknown region kind {kind}", offset)
    if not length or addr + length > 1 << 64 or first_page + region_pages(addr, length) > MAX_PAGES:
        raise corrupt(where, "a region has an invalid size", offset)
    if not page_size_fits(KINDS[kind], page_size):
        raise corrupt(where, f"a region of kind {KINDS[kind]} has an invalid page size, {page_size}", offset)


class VmstateEntry(NamedTuple):
    """The index entry of a VMST record."""

    offset: int
    record_bytes: int
    part: int
    raw_bytes: int
    entries: int


def check_vmstate_entry(where: Named, record: Record, entry: VmstateEntry) -> None:
    """Raise `CorruptImageError` unless a VMST record matches its index entry."""
    size = record.end - record.offset
    if entry != (record.offset, size, record.arg, record.raw_bytes, 0):
        raise corrupt(where, "a VMST record does not match its index entry", record.offset)


class Order:
    """Checks the order, the sequence numbers and the count of the records of one image.

    ``first`` has the offset of the first record of each type. ``memory_start`` is the end of the last REGN
    record: no index entry may point before it.
    """

    def __init__(self, where: Named) -> None:
        self._where = where
        self._stage = "regions"
        self.records = 0
        self.counts: dict[bytes, int] = {}
        self.first: dict[bytes, int] = {}
        self.memory_start = HEADER_BYTES

    def check(self, record: Record) -> None:
        """Check the next record. Raises `ImageError` if it is not allowed here."""
        if record.seq != self.records:
            text = f"found record {record.seq} instead of {self.records}"
            raise corrupt(self._where, text, record.offset)
        known = record.type in KNOWN_TYPES
        stage = _NEXT_STAGE[self._stage].get(record.type) if known else self._stage
        if stage is None or not (known or self._stage in _UNKNOWN_ALLOWED):
            text = record.type.decode("ascii", "backslashreplace")
            raise corrupt(self._where, f"{text!r} is in the wrong place ({self._stage})", record.offset)
        self.records += 1
        self.counts[record.type] = self.counts.get(record.type, 0) + 1
        self.first.setdefault(record.type, record.offset)
        if known and record.last_part:
            stage = _AFTER_LAST_PART.get(stage, stage)
        if record.type == b"REGN":
            self.memory_start = record.end
        self._stage = stage

    @property
    def done(self) -> bool:
        """Whether the trailer was checked."""
        return self._stage == "done"

    def check_trailer(self, trailer: Trailer, stats: dict[str, Any]) -> None:
        """Raise `CorruptImageError` unless trailer and statistics match the records."""
        counts = (self.records, self.counts.get(b"CHNK", 0), self.counts.get(b"VMST", 0))
        if counts != (trailer.records, trailer.chunks, trailer.vmstate_parts):
            raise corrupt(self._where, "the trailer has wrong counts of records", trailer.indx_offset)
        places = tuple(self.first[name] for name in (b"REGN", b"STAT", b"INDX"))
        if places != (trailer.regn_offset, trailer.stat_offset, trailer.indx_offset):
            raise corrupt(self._where, "the trailer's offsets are wrong", trailer.indx_offset)
        if stats.get("image_bytes") != trailer.image_bytes:
            raise corrupt(self._where, "the size in the statistics is wrong", trailer.stat_offset)
