"""What the headers of an image say, once they are verified. FORMAT.md has the fields."""

from __future__ import annotations

from typing import NamedTuple

LAST_PART = 1
"""The flag of a record that no further part of the same thing follows."""


class FileHeader(NamedTuple):
    """What the first 64 bytes say."""

    version: tuple[int, int]
    image_id: bytes
    parent_id: bytes


class Record(NamedTuple):
    """One record's verified header and meta; the payload is still in the file."""

    offset: int
    type: bytes
    encoding: int
    flags: int
    stored_bytes: int
    raw_bytes: int
    arg: int
    seq: int
    payload_crc: int
    header: bytes
    meta: bytes

    @property
    def payload_offset(self) -> int:
        """Where the payload begins."""
        return self.offset + len(self.header) + len(self.meta)

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.payload_offset + self.stored_bytes

    @property
    def last_part(self) -> bool:
        """Whether no further part of the same thing follows."""
        return bool(self.flags & LAST_PART)


class Trailer(NamedTuple):
    """Offsets in bytes from the start of the file; counts of records."""

    regn_offset: int
    stat_offset: int
    indx_offset: int
    records: int
    chunks: int
    vmstate_parts: int
    image_bytes: int
    image_id: bytes
