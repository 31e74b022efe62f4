"""Records in: the one place that takes bytes of an image apart. FORMAT.md defines every field.

Nothing is parsed before its checksum has been verified, and no size that the file states is
believed beyond the format's limits, so a hostile file can make this allocate 4 MiB at most.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol

import zstandard

from snapengine.checksum import crc32c_of
from snapengine.errors import CorruptImageError, ImageError, TruncatedImageError, UnsupportedVersionError
from snapengine.packing import MAX_PAGES, NAME_BYTES, RAW, REGION, ZSTD, region_pages
from snapengine.targets import KINDS, PAGE_BYTES

MAGIC = b"\x89SNPE\r\n\x1a"
MAJOR = 1
FEATURES = 0
LAST_PART = 1
MAY_IGNORE = 1 << 15
KNOWN_TYPES = (b"REGN", b"CHNK", b"VMST", b"STAT", b"INDX", b"TRLR")
CHUNK_MAX_BYTES = 4 << 20
META_MAX_BYTES = 256 << 10

FILE_HEADER = struct.Struct("<8sHHIQ16s16sII")
RECORD = struct.Struct("<4sHHQQIIQII")
TRAILER = struct.Struct("<QQQQQQQ16s")
INDEX_ENTRY_BYTES = 40
TRAILER_RECORD_BYTES = RECORD.size + TRAILER.size


class Source(Protocol):
    """Where bytes come from: a file (any offset) or a stream (ascending offsets only)."""

    name: str

    def take(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset`, or `TruncatedImageError`."""


class FileSource:
    """A regular file, by pread. Does not own `fd`."""

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name
        self.size = os.fstat(fd).st_size

    def take(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes at `offset`, or `TruncatedImageError` before anything is allocated."""
        if offset + count > self.size:
            raise TruncatedImageError(f"{self.name}: ends at byte {self.size}, inside of a record", offset)
        parts: list[bytes] = []
        while count:
            part = os.pread(self.fd, count, offset)
            if not part:
                raise TruncatedImageError(f"{self.name}: became shorter while it was read", offset)
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class StreamSource:
    """A readable file object that cannot seek."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.name = str(getattr(file, "name", "stream"))
        self.position = 0

    def take(self, offset: int, count: int) -> bytes:
        """The next `count` bytes; `offset` says where the caller thinks they are."""
        if offset != self.position:
            raise CorruptImageError(f"{self.name}: a reference to byte {offset} of a stream", self.position)
        data = bytearray()
        while len(data) < count:
            part = self._file.read(count - len(data))
            if not part:
                raise TruncatedImageError(f"{self.name}: ends inside of a record", offset)
            data += part
        self.position += count
        return bytes(data)

    def at_end(self) -> bool:
        """Whether nothing follows."""
        return not self._file.read(1)


class FileHeader(NamedTuple):
    """What the first 64 bytes say."""

    version: tuple[int, int]
    image_id: bytes
    parent_id: bytes


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


def read_file_header(source: Source) -> FileHeader:
    """Check magic, version and features. `ImageError` tells a non-image from a newer or a cut one."""
    try:
        magic = source.take(0, len(MAGIC))
    except TruncatedImageError:
        raise TruncatedImageError(f"{source.name}: empty or too short to be an image") from None
    if magic != MAGIC:
        raise CorruptImageError(f"{source.name}: not a snapengine image")
    data = magic + source.take(len(MAGIC), FILE_HEADER.size - len(MAGIC))
    _, major, minor, _, features, image_id, parent_id, _, crc = FILE_HEADER.unpack(data)
    if crc32c_of(data[:-4]) != crc:
        raise CorruptImageError(f"{source.name}: the file header's checksum does not match", 0)
    if major != MAJOR:
        raise UnsupportedVersionError(f"{source.name}: format version {major}; this program reads {MAJOR}")
    if features & ~FEATURES:
        raise UnsupportedVersionError(f"{source.name}: needs features {features:#x} that are unknown here")
    return FileHeader((major, minor), image_id, parent_id)


def read_record(source: Source, offset: int, *, expect: bytes | None = None) -> Record:
    """Header and meta of the record at `offset`, verified; its payload comes from `read_payload`."""
    header = source.take(offset, RECORD.size)
    type_, encoding, flags, stored, raw, meta_bytes, arg, seq, payload_crc, crc = RECORD.unpack(header)
    if meta_bytes > META_MAX_BYTES:  # bounds the read below; the checksum follows it
        raise CorruptImageError(f"{source.name}: a record header is damaged", offset)
    meta = source.take(offset + RECORD.size, meta_bytes)
    if crc32c_of(meta, crc32c_of(header[:-4])) != crc:
        raise CorruptImageError(f"{source.name}: a record header's checksum does not match", offset)
    record = Record(offset, type_, encoding, flags, stored, raw, arg, seq, payload_crc, header, meta)
    _check_record(source, record, expect)
    return record


def _check_record(source: Source, record: Record, expect: bytes | None) -> None:
    text = record.type.decode("ascii", "backslashreplace")
    if record.type not in KNOWN_TYPES:
        if not record.flags & MAY_IGNORE:
            raise UnsupportedVersionError(f"{source.name}: unknown record {text!r}", record.offset)
        if record.stored_bytes > 1 << 62:
            raise CorruptImageError(f"{source.name}: record {text!r} has an impossible size", record.offset)
    elif record.flags & ~(LAST_PART | MAY_IGNORE) or record.encoding not in (RAW, ZSTD):
        raise UnsupportedVersionError(f"{source.name}: {text} uses an unknown encoding or flag", record.offset)
    elif record.raw_bytes > CHUNK_MAX_BYTES or (
        record.stored_bytes >= record.raw_bytes
        if record.encoding == ZSTD
        else record.stored_bytes != record.raw_bytes
    ):
        raise CorruptImageError(f"{source.name}: {text} has impossible sizes", record.offset)
    if expect is not None and record.type != expect:
        raise CorruptImageError(f"{source.name}: {text} where {expect.decode()} should be", record.offset)


def read_payload(source: Source, record: Record) -> bytes:
    """The payload of a known record: verified, then decompressed; `record.raw_bytes` bytes."""
    data = source.take(record.payload_offset, record.stored_bytes)
    if crc32c_of(data) != record.payload_crc:
        text = record.type.decode()
        raise CorruptImageError(f"{source.name}: the payload's checksum of {text} does not match", record.offset)
    if record.encoding == RAW:
        return data
    try:
        return decompress(data, record.raw_bytes)
    except (ValueError, zstandard.ZstdError) as error:
        raise CorruptImageError(f"{source.name}: zstd: {error}", record.offset) from None


def decompress(data: bytes, raw_bytes: int) -> bytes:
    """Exactly one zstd frame that states its size as `raw_bytes`; nothing bigger is ever allocated."""
    if zstandard.frame_content_size(data) != raw_bytes:
        raise ValueError("the frame's size is not the record's")
    raw = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    if len(raw) != raw_bytes:
        raise ValueError("the frame's size is not the record's")
    return raw


def skip_payload(source: Source, record: Record) -> None:
    """Verify the payload of a record of unknown type, in pieces."""
    crc = 0
    for start in range(record.payload_offset, record.end, CHUNK_MAX_BYTES):
        crc = crc32c_of(source.take(start, min(CHUNK_MAX_BYTES, record.end - start)), crc)
    if crc != record.payload_crc:
        raise CorruptImageError(f"{source.name}: the payload's checksum does not match", record.offset)


def parse_trailer(source: Source, record: Record, payload: bytes, header: FileHeader) -> Trailer:
    """The trailer, checked against the file header and its own place in the file."""
    if len(payload) != TRAILER.size:
        raise CorruptImageError(f"{source.name}: the trailer has a wrong size", record.offset)
    trailer = Trailer(*TRAILER.unpack(payload))
    if trailer.image_id != header.image_id:
        raise CorruptImageError(f"{source.name}: the trailer belongs to another image", record.offset)
    if trailer.image_bytes != record.end or trailer.records != record.seq + 1:
        raise CorruptImageError(f"{source.name}: the trailer is not where it says it is", record.offset)
    if not FILE_HEADER.size == trailer.regn_offset <= trailer.stat_offset < trailer.indx_offset < record.offset:
        raise CorruptImageError(f"{source.name}: the trailer's offsets are impossible", record.offset)
    return trailer


def parse_regions(source: Source, record: Record, payload: bytes) -> Iterator[ImageRegion]:
    """The regions in one REGN record."""
    position = 0
    for _ in range(record.arg):
        if position + REGION.size > len(payload):
            raise CorruptImageError(f"{source.name}: the regions do not fit their record", record.offset)
        addr, length, first_page, page_size, kind, name_bytes = REGION.unpack_from(payload, position)
        position += REGION.size
        name = payload[position : position + name_bytes]
        position += name_bytes
        pages = region_pages(addr, length)
        if kind >= len(KINDS):
            raise UnsupportedVersionError(f"{source.name}: unknown kind of region {kind}", record.offset)
        if not length or addr + length > 1 << 64 or first_page + pages > MAX_PAGES:
            raise CorruptImageError(f"{source.name}: a region has an impossible size", record.offset)
        yield ImageRegion(text_of(source, record, name), addr, length, page_size, KINDS[kind], first_page)
    if position != len(payload):
        raise CorruptImageError(f"{source.name}: the regions do not fit their record", record.offset)


def check_regions(source: Source, regions: list[ImageRegion]) -> None:
    """No page number belongs to two regions."""
    taken = sorted((region.first_page, region.first_page + region.pages) for region in regions)
    for (_, end), (first, _) in zip(taken, taken[1:], strict=False):
        if first < end:
            raise CorruptImageError(f"{source.name}: two regions share page number {first}", FILE_HEADER.size)


def text_of(source: Source, record: Record, name: bytes) -> str:
    """A name in UTF-8 of at most 4096 bytes."""
    if len(name) > NAME_BYTES:
        raise CorruptImageError(f"{source.name}: a name is too long", record.offset)
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise CorruptImageError(f"{source.name}: a name is not UTF-8", record.offset) from None


def diagnose(source: FileSource) -> ImageError:
    """Why a file has no valid trailer at its end: walk the records to the place where they stop."""
    offset = FILE_HEADER.size
    try:
        while True:
            record = read_record(source, offset)
            if record.end > source.size:
                return TruncatedImageError(f"{source.name}: ends at byte {source.size}, inside of a record", offset)
            offset = record.end
            if record.type == b"TRLR":
                return CorruptImageError(f"{source.name}: the trailer is damaged, or bytes follow it", record.offset)
            if offset == source.size:
                return TruncatedImageError(f"{source.name}: there is no trailer; it was never completed", offset)
    except ImageError as error:
        return error
