"""The verified headers of an image. FORMAT.md defines the fields."""

from __future__ import annotations

from typing import NamedTuple

LAST_PART = 1
"""Flag of a record: it is the last part of its kind."""


class FileHeader(NamedTuple):
    """The fields of the first 64 bytes."""

    version: tuple[int, int]
    image_id: bytes
    parent_id: bytes


class Record(NamedTuple):
    """The verified header and meta of one record. The payload is still in the file."""

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
        """File offset of the payload."""
        return self.offset + len(self.header) + len(self.meta)

    @property
    def end(self) -> int:
        """File offset of the next record."""
        return self.payload_offset + self.stored_bytes

    @property
    def last_part(self) -> bool:
        """Whether this is the last part."""
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
