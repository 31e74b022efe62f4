"""What FORMAT.md demands of an image: one set of rules for the reader of a file and for that of a pipe.

Both call the same functions here, with the same records in the same order, so neither accepts what the other
refuses. Nothing here reads: the values come out of headers and payloads whose checksums were verified.
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
PARTED = (b"REGN", b"VMST", b"INDX")
"""Records that come in parts; the last one has a flag."""
KNOWN_TYPES = (b"REGN", b"CHNK", b"VMST", b"PADD", b"STAT", b"INDX", b"TRLR")
_NEXT: dict[str, dict[bytes, str]] = {
    "regions": {b"REGN": "regions"},
    "memory": {b"CHNK": "memory", b"VMST": "memory", b"PADD": "memory", b"STAT": "figures"},
    "figures": {b"INDX": "index"},
    "index": {b"INDX": "index"},
    "end": {b"TRLR": "done"},
    "done": {},
}
_AFTER_LAST_PART = {"regions": "memory", "index": "end"}
_UNKNOWN_IN = ("memory", "figures", "end")


def check_file_header(where: Named, version: tuple[int, int], header_bytes: int, features: int,
                      reserved: int) -> None:  # fmt: skip
    """`ImageError` unless the file header's fields are ones that this version reads."""
    major, minor = version
    if major != MAJOR:
        raise UnsupportedVersionError(f"{where.name}: format version {major}; this program reads {MAJOR}")
    if features & ~FEATURES:
        raise UnsupportedVersionError(f"{where.name}: needs features {features:#x} that are unknown here")
    if header_bytes != HEADER_BYTES:
        raise corrupt(where, f"the file header states {header_bytes} bytes; it has {HEADER_BYTES}", 0)
    if reserved and not minor:  # a later minor version may have a use for it
        raise corrupt(where, "the file header's reserved field is not 0", 0)


def check_record(where: Named, record: Record) -> None:
    """`ImageError` unless one record, seen alone, has the form that its type demands."""
    text = record.type.decode("ascii", "backslashreplace")
    if record.type not in KNOWN_TYPES:
        if not record.flags & MAY_IGNORE:
            raise UnsupportedVersionError(f"{where.name}: unknown record {text!r}", record.offset)
        if record.stored_bytes > UNKNOWN_MAX_BYTES:
            raise corrupt(where, f"record {text!r} has an impossible size", record.offset)
        return
    if record.flags & ~(LAST_PART | MAY_IGNORE) or record.encoding not in (RAW, ZSTD):
        text += " uses an unknown encoding or flag"
        raise UnsupportedVersionError(f"{where.name}: {text}", record.offset)
    if record.flags & LAST_PART and record.type not in PARTED:
        raise corrupt(where, f"{text} has the flag of a last part, and has no parts", record.offset)
    if not _sizes_fit(record):
        raise corrupt(where, f"{text} has impossible sizes", record.offset)
    if not _meta_fits(record):
        raise corrupt(where, f"{text} has a meta of {len(record.meta)} bytes, which it cannot have",
                      record.offset)  # fmt: skip
    if record.type == b"PADD" and (record.flags != MAY_IGNORE or record.arg or any(record.meta)):
        raise corrupt(where, "PADD is not what the writer pads with", record.offset)


def _sizes_fit(record: Record) -> bool:
    limit = {b"CHNK": CHUNK_MAX_BYTES, b"STAT": CHUNK_MAX_BYTES, b"TRLR": TRAILER_BYTES, b"PADD": 0}
    if record.raw_bytes > limit.get(record.type, PART_BYTES):
        return False
    if record.type == b"TRLR" and record.stored_bytes != TRAILER_BYTES:  # it is found from the end
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
    """`ImageError` unless the numbers of a region, in the record at `offset`, are possible."""
    if kind >= len(KINDS):
        raise UnsupportedVersionError(f"{where.name}: unknown kind of region {kind}", offset)
    if not length or addr + length > 1 << 64 or first_page + region_pages(addr, length) > MAX_PAGES:
        raise corrupt(where, "a region has an impossible size", offset)
    if not page_size_fits(KINDS[kind], page_size):
        raise corrupt(where, f"a region of the kind {KINDS[kind]} has pages of {page_size} bytes", offset)


class Listed(NamedTuple):
    """What an index entry says of a VMST record."""

    offset: int
    record_bytes: int
    part: int
    raw_bytes: int
    entries: int


def check_listed(where: Named, record: Record, listed: Listed) -> None:
    """`CorruptImageError` unless the index says of a VMST record what it is."""
    size = record.end - record.offset
    if listed != (record.offset, size, record.arg, record.raw_bytes, 0):
        raise corrupt(where, "a VMST record is not what the index says", record.offset)


class Order:
    """The records of one image, each taken in turn: their order, their numbers, and how many there are.

    ``first`` has the offset of the first record of each type; ``memory_start`` is where the last region's
    record ends: no entry of the index points before it.
    """

    def __init__(self, where: Named) -> None:
        self._where = where
        self._stage = "regions"
        self.records = 0
        self.counts: dict[bytes, int] = {}
        self.first: dict[bytes, int] = {}
        self.memory_start = HEADER_BYTES

    def take(self, record: Record) -> None:
        """The next record. `ImageError`: it cannot stand here."""
        if record.seq != self.records:
            text = f"record {record.seq} where {self.records} should be"
            raise corrupt(self._where, text, record.offset)
        known = record.type in KNOWN_TYPES
        stage = _NEXT[self._stage].get(record.type) if known else self._stage
        if stage is None or not (known or self._stage in _UNKNOWN_IN):
            text = record.type.decode("ascii", "backslashreplace")
            raise corrupt(self._where, f"{text!r} in the wrong place ({self._stage})", record.offset)
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
        """Whether the trailer was taken."""
        return self._stage == "done"

    def check_trailer(self, trailer: Trailer, stats: dict[str, Any]) -> None:
        """`CorruptImageError` unless trailer and figures say what was taken."""
        counts = (self.records, self.counts.get(b"CHNK", 0), self.counts.get(b"VMST", 0))
        if counts != (trailer.records, trailer.chunks, trailer.vmstate_parts):
            raise corrupt(self._where, "records and trailer contradict each other", trailer.indx_offset)
        places = tuple(self.first[name] for name in (b"REGN", b"STAT", b"INDX"))
        if places != (trailer.regn_offset, trailer.stat_offset, trailer.indx_offset):
            raise corrupt(self._where, "the trailer's offsets are wrong", trailer.indx_offset)
        if stats.get("image_bytes") != trailer.image_bytes:
            raise corrupt(self._where, "the figures state another size", trailer.stat_offset)
