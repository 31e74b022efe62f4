"""Parsing of records. FORMAT.md defines every field.

No data is parsed before its checksum is verified, and no size in the file may exceed the limits of the
format. A hostile file can therefore cause an allocation of at most 4 MiB.
"""

from __future__ import annotations

import struct

import zstandard

from snapengine.base.checksum import crc32c_of
from snapengine.errors import ImageError, TruncatedImageError
from snapengine.image.encode import RAW
from snapengine.image.headers import FileHeader, Record
from snapengine.image.input import Input, Named, corrupt, truncated
from snapengine.image.rules import (
    CHUNK_MAX_BYTES,
    META_MAX_BYTES,
    check_file_header,
    check_record,
)
from snapengine.storage.source import Source

MAGIC = b"\x89SNPE\r\n\x1a"

FILE_HEADER = struct.Struct("<8sHHIQ16s16sII")
RECORD = struct.Struct("<4sHHQQIIQII")


def read_file_header(source: Input) -> FileHeader:
    """Check magic, version and features. Errors distinguish non-images, newer and truncated images."""
    try:
        magic = source.read_exactly(0, len(MAGIC))
    except TruncatedImageError:
        raise truncated(source, "empty or too short to be an image") from None
    if magic != MAGIC:
        raise corrupt(source, "not a snapengine image")
    data = magic + source.read_exactly(len(MAGIC), FILE_HEADER.size - len(MAGIC))
    _, major, minor, size, features, image_id, parent_id, reserved, crc = FILE_HEADER.unpack(data)
    if crc32c_of(data[:-4]) != crc:
        raise corrupt(source, "the file header's checksum does not match", 0)
    check_file_header(source, (major, minor), size, features, reserved)
    return FileHeader((major, minor), image_id, parent_id)


def read_record(source: Input, offset: int, *, expect: bytes | None = None) -> Record:
    """Read and verify header and meta of the record at `offset`. `read_payload` reads its payload."""
    header = source.read_exactly(offset, RECORD.size)
    type_, encoding, flags, stored, raw, meta_bytes, arg, seq, payload_crc, crc = RECORD.unpack(header)
    if meta_bytes > META_MAX_BYTES:  # limits the next read; the checksum is verified after it
        raise corrupt(source, "a record header is damaged", offset)
    meta = source.read_exactly(offset + RECORD.size, meta_bytes)
    if crc32c_of(meta, crc32c_of(header[:-4])) != crc:
        raise corrupt(source, "a record header's checksum does not match", offset)
    record = Record(offset, type_, encoding, flags, stored, raw, arg, seq, payload_crc, header, meta)
    check_record(source, record)
    if expect is not None and record.type != expect:
        text = record.type.decode("ascii", "backslashreplace")
        raise corrupt(source, f"found {text} instead of {expect.decode()}", offset)
    return record


def read_payload(source: Input, record: Record) -> bytes:
    """Read, verify and decompress the payload of a known record: `record.raw_bytes` bytes."""
    return decode_payload(source, record, read_stored_payload(source, record))


def read_stored_payload(source: Input, record: Record) -> bytes:
    """Read and verify the payload of a known record, without decompression."""
    data = source.read_exactly(record.payload_offset, record.stored_bytes)
    if crc32c_of(data) != record.payload_crc:
        text = record.type.decode()
        raise corrupt(source, f"the payload checksum of {text} does not match", record.offset)
    return data


def decode_payload(where: Named, record: Record, data: bytes) -> bytes:
    """Decompress the result of `read_stored_payload`."""
    if record.encoding == RAW:
        return data
    try:
        return decompress(data, record.raw_bytes)
    except (ValueError, zstandard.ZstdError) as error:
        raise corrupt(where, f"zstd: {error}", record.offset) from None


def decompress(
    data: bytes | memoryview, raw_bytes: int, decompressor: zstandard.ZstdDecompressor | None = None
) -> bytes:
    """Decompress exactly one zstd frame, whose header must have the size `raw_bytes`; no more is allocated.

    A `decompressor` may be reused, by one thread at a time. Raises ValueError or ZstdError.
    """
    if zstandard.frame_content_size(data) != raw_bytes:
        raise ValueError("the frame's size is not the record's")
    raw = (decompressor or zstandard.ZstdDecompressor()).decompress(data, allow_extra_data=False)
    if len(raw) != raw_bytes:
        raise ValueError("the frame's size is not the record's")
    return raw


def skip_payload(source: Input, record: Record) -> None:
    """Verify the payload of a record of unknown type."""
    crc = 0
    for start in range(record.payload_offset, record.end, CHUNK_MAX_BYTES):
        crc = crc32c_of(source.read_exactly(start, min(CHUNK_MAX_BYTES, record.end - start)), crc)
    if crc != record.payload_crc:
        raise corrupt(source, "the payload checksum does not match", record.offset)


def diagnose(source: Source) -> ImageError:
    """Determine why a file has no valid trailer: follow the records to the first error."""
    offset = FILE_HEADER.size
    try:
        while True:
            record = read_record(source, offset)
            if record.end > source.size:
                return truncated(source, f"ends at byte {source.size}, inside a record", offset)
            offset = record.end
            if record.type == b"TRLR":
                return corrupt(source, "the trailer is damaged, or bytes follow it", record.offset)
            if offset == source.size:
                return truncated(source, "has no trailer: it was never completed", offset)
    except ImageError as error:
        return error
