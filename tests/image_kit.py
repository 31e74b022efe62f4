"""Helpers for tests of images: a small image with every kind of record, and tools to damage it."""

from __future__ import annotations

import io
import random
import struct
from dataclasses import dataclass

from snapengine.base.checksum import crc32c_of
from snapengine.image import Image, open_image
from snapengine.image.headers import Record
from snapengine.image.records import RECORD, read_record
from snapengine.image.stream import stream_image
from snapengine.image.writer import Writer
from snapengine.regions import PAGE_BYTES, Region
from snapengine.storage.sinks import MemorySink
from snapengine.storage.stream_source import StreamSource

DATA, ZERO, HOLE, LOST = range(4)
FIELDS = {
    "type": (0, "<4s"),
    "encoding": (4, "<H"),
    "flags": (6, "<H"),
    "stored_bytes": (8, "<Q"),
    "raw_bytes": (16, "<Q"),
    "meta_bytes": (24, "<I"),
    "arg": (28, "<I"),
    "seq": (32, "<Q"),
    "payload_crc": (40, "<I"),
}


@dataclass
class Sample:
    """An image and its expected content."""

    data: bytes
    memory: dict[str, bytes]
    vmstate: dict[str, bytes]


def noise(pages: int, seed: int) -> bytes:
    """Incompressible pages."""
    return random.Random(seed).randbytes(pages * PAGE_BYTES)


def pattern(pages: int, seed: int) -> bytes:
    """Compressible pages, none of them zero."""
    return b"".join(bytes([1 + (seed + page) % 255]) * PAGE_BYTES for page in range(pages))


def sample() -> Sample:
    """Two regions (the second begins inside a page), raw and zstd chunks, repeats, vmstate."""
    sink = MemorySink()
    writer = Writer(sink, image_id=bytes(range(16)))
    ram, device = Region("ram", 0x10000, 10 * PAGE_BYTES), Region("io", 0x100800, 6000, 4096, "shared")
    writer.begin([(ram, 0), (device, 512)])
    first, packed, late = noise(2, 1), pattern(2, 7), noise(2, 2)
    writer.py_chunk([(0, 2, DATA), (2, 3, ZERO), (5, 5, HOLE)], first)
    writer.vmstate("cpu", b"registers")
    writer.py_chunk([(512, 2, DATA)], packed, level=1)
    writer.py_chunk([(6, 1, DATA), (1, 1, DATA)], late)
    writer.vmstate("disk", pattern(300, 3), level=1)
    writer.finish({"method": "write-tracking"})
    sink.commit()
    ram = first[:4096] + late[4096:] + bytes(4 * 4096) + late[:4096] + bytes(3 * 4096)
    memory = {"ram": ram, "io": packed[0x800 : 0x800 + 6000]}
    return Sample(sink.getvalue(), memory, {"cpu": b"registers", "disk": pattern(300, 3)})


def records(data: bytes) -> list[Record]:
    """Every record of a valid image."""
    found, offset = [], 64
    while offset < len(data):
        source = StreamSource(io.BytesIO(data[offset:]))
        record = read_record(source, 0)._replace(offset=offset)
        found.append(record)
        offset = record.end
    return found


def reseal(data: bytes, record: Record, payload: bytes | None = None, **fields: int | bytes) -> bytes:
    """Change fields (and the payload, of the same length) of a record, and recompute its checksums."""
    changed = bytearray(data)
    if payload is not None:
        changed[record.payload_offset : record.end] = payload
        fields["payload_crc"] = crc32c_of(payload)
    for name, value in fields.items():
        position, form = FIELDS[name]
        struct.pack_into(form, changed, record.offset + position, value)
    start = record.offset
    crc = crc32c_of(changed[start : start + RECORD.size - 4])
    crc = crc32c_of(changed[start + RECORD.size : record.payload_offset], crc)
    struct.pack_into("<I", changed, start + RECORD.size - 4, crc)
    return bytes(changed)


def of_type(data: bytes, name: bytes, number: int = 0) -> Record:
    """The `number`-th record of that type."""
    return [record for record in records(data) if record.type == name][number]


def opened(data: bytes) -> Image:
    """The image in those bytes."""
    return open_image(io.BytesIO(data))


def read_everything(data: bytes) -> None:
    """Open, verify and read everything; raises if anything is wrong."""
    with opened(data) as image:
        image.verify()
        for region in image.regions:
            image.read(region, 0, region.length)
        for name in image.vmstate:
            image.vmstate[name]


def stream_everything(data: bytes) -> None:
    """The same through the sequential reader."""
    stream = stream_image(io.BytesIO(data))
    for _ in stream:
        pass
    for region in stream.regions:
        stream.check_complete(region)
