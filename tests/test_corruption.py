"""Damage: every truncation and every flipped bit is found; false values with valid checksums cost nothing."""

import struct
import subprocess
import sys
import textwrap

import pytest
from image_kit import noise, of_type, opened, read_everything, records, reseal, sample, stream_everything

from snapengine.base.checksum import crc32c_of
from snapengine.errors import (
    CorruptImageError,
    ImageError,
    TruncatedImageError,
    UnsupportedVersionError,
)
from snapengine.image.records import RECORD

SAMPLE = sample()
RECORDS = records(SAMPLE.data)
HUGE = 1 << 60


def cuts():
    """Every record boundary and the bytes around it, and a coarse sample of the rest."""
    edges = {0, 8, 64} | {r.offset for r in RECORDS} | {r.payload_offset for r in RECORDS}
    near = {edge + step for edge in edges for step in (-3, -1, 0, 1, 3)}
    return sorted(cut for cut in near | set(range(0, len(SAMPLE.data), 173)) if 0 <= cut < len(SAMPLE.data))


def test_a_cut_anywhere_is_a_truncated_image():
    for cut in cuts():
        with pytest.raises(TruncatedImageError):
            opened(SAMPLE.data[:cut])
        with pytest.raises(TruncatedImageError):
            stream_everything(SAMPLE.data[:cut])


def test_bytes_behind_the_trailer_are_found():
    for tail in (b"x", bytes(4096), SAMPLE.data):
        with pytest.raises(CorruptImageError):
            opened(SAMPLE.data + tail)
        with pytest.raises(CorruptImageError):
            stream_everything(SAMPLE.data + tail)


def flips():
    """(byte, is it in a meta_bytes field): every byte of headers and page maps, a sample of the payloads."""
    places = {position: False for position in range(64)}
    for record in RECORDS:
        for position in range(record.offset, record.payload_offset):
            places[position] = 24 <= position - record.offset < 28
        for position in range(record.payload_offset, record.end, 211):
            places[position] = False
        if record.type in (b"TRLR", b"INDX", b"REGN"):
            places.update(dict.fromkeys(range(record.payload_offset, record.end), False))
    return sorted(places.items())


@pytest.mark.parametrize("read", [read_everything, stream_everything])
def test_every_flipped_bit_is_found(read):
    for position, in_size in flips():
        damaged = bytearray(SAMPLE.data)
        damaged[position] ^= 1 << (position % 8)
        # With a wrong meta size the end of the header is unknown: it may lie behind the end of the file.
        expected = (CorruptImageError, TruncatedImageError) if in_size else CorruptImageError
        with pytest.raises(expected):
            read(bytes(damaged))


def test_no_flipped_bit_gives_a_wrong_byte():
    wrong = 0
    for position, _ in flips()[::3]:
        damaged = bytearray(SAMPLE.data)
        damaged[position] ^= 0x10
        try:
            with opened(bytes(damaged)) as image:
                for name, memory in SAMPLE.memory.items():
                    wrong += image.read(name, 0, len(memory)) != memory
                for name, blob in SAMPLE.vmstate.items():
                    wrong += image.vmstate[name] != blob
        except ImageError:
            continue
    assert wrong == 0


def test_swapped_records_are_found():
    chunk, other = of_type(SAMPLE.data, b"CHNK", 0), of_type(SAMPLE.data, b"CHNK", 2)
    assert chunk.stored_bytes == other.stored_bytes
    data = bytearray(SAMPLE.data)
    data[chunk.payload_offset : chunk.end], data[other.payload_offset : other.end] = (
        data[other.payload_offset : other.end],
        data[chunk.payload_offset : chunk.end],
    )
    with pytest.raises(CorruptImageError):
        read_everything(bytes(data))


def region_payload(**changes):
    payload = SAMPLE.data[RECORDS[0].payload_offset : RECORDS[0].end]
    names = ("addr", "length", "first_page", "page_size", "kind", "name_bytes")
    fields = dict(zip(names, struct.unpack_from("<QQQIHH", payload), strict=True)) | changes
    return struct.pack("<QQQIHH", *fields.values()) + payload[32:]


def index_payload(record_type, entry=0, **changes):
    record = of_type(SAMPLE.data, record_type)
    payload = bytearray(SAMPLE.data[record.payload_offset : record.end])
    names = ("offset", "record_bytes", "first_page", "last_page", "entries", "type")
    fields = dict(zip(names, struct.unpack_from("<QQQQII", payload, 40 * entry), strict=True)) | changes
    struct.pack_into("<QQQQII", payload, 40 * entry, *fields.values())
    return bytes(payload)


def trailer_payload(**changes):
    record = RECORDS[-1]
    payload = SAMPLE.data[record.payload_offset : record.end]
    names = ("regn", "stat", "indx", "records", "chunks", "vmstate", "bytes", "id")
    fields = dict(zip(names, struct.unpack("<QQQQQQQ16s", payload), strict=True)) | changes
    return struct.pack("<QQQQQQQ16s", *fields.values())


def lies():
    """(name, image): a false value of every size, count and reference in a file, with valid checksums."""
    data = SAMPLE.data
    regn, stat, indx, trlr = RECORDS[0], of_type(data, b"STAT"), of_type(data, b"INDX"), RECORDS[-1]
    for name in (b"CHNK", b"VMST", b"STAT", b"INDX", b"REGN", b"TRLR"):
        record = of_type(data, name)
        for field in ("stored_bytes", "raw_bytes"):
            for value in (0, record.stored_bytes + 1, 5 << 20, HUGE, 2**64 - 1):
                yield f"{name} {field} {value}", reseal(data, record, **{field: value})
        both = {"stored_bytes": HUGE, "raw_bytes": HUGE}
        yield f"{name} both huge", reseal(data, record, **both)
        for value in (record.raw_bytes - 1, 1 << 18, (1 << 18) + 8, 2**32 - 1):
            yield f"{name} meta {value}", reseal(data, record, meta_bytes=value & 0xFFFFFFFF)
        yield f"{name} seq", reseal(data, record, seq=record.seq + 1)
    packed = of_type(data, b"CHNK", 1)
    for value in (4096, 3 * 4096, 4 << 20):
        yield f"zstd raw {value}", reseal(data, packed, raw_bytes=value)
    yield "zstd frame", reseal(data, packed, payload=noise(1, 9)[: packed.stored_bytes])
    frame = data[packed.payload_offset : packed.end]
    for size in (5 << 20, 1 << 40, 2**63):  # a frame whose size differs from that in its record
        bomb = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + frame[13:]
        bomb = bomb[: len(frame)].ljust(len(frame), b"\0")
        yield f"zstd bomb {size}", reseal(data, packed, payload=bomb)
    for change in (
        {"length": 1 << 50}, {"length": 2**64 - 1}, {"length": 0}, {"addr": 2**64 - 1},
        {"first_page": 1 << 40}, {"first_page": 2**64 - 1}, {"first_page": 512}, {"name_bytes": 65535},
        {"name_bytes": 2},
    ):  # fmt: skip
        yield f"region {change}", reseal(data, regn, payload=region_payload(**change))
    for count in (0, 1, 3, 2**32 - 1):
        yield f"regions {count}", reseal(data, regn, arg=count)
        yield f"index {count}", reseal(data, indx, arg=count)
    for change in (
        {"offset": 0}, {"offset": HUGE}, {"offset": 2**64 - 1}, {"offset": 65}, {"record_bytes": HUGE},
        {"record_bytes": 0}, {"record_bytes": 49}, {"entries": 0}, {"entries": 2**32 - 1}, {"entries": 4},
        {"first_page": 1}, {"last_page": 2**63}, {"last_page": 8}, {"type": 1},
    ):  # fmt: skip
        yield f"index {change}", reseal(data, indx, payload=index_payload(b"INDX", **change))
    for key in ("regn", "stat", "indx", "records", "chunks", "vmstate", "bytes"):
        for value in (0, 1, 65, HUGE, 2**64 - 1):
            yield f"trailer {key} {value}", reseal(data, trlr, payload=trailer_payload(**{key: value}))
    yield "trailer id", reseal(data, trlr, payload=trailer_payload(id=bytes(16)))
    chunk = of_type(data, b"CHNK")
    yield "chunk number", reseal(data, chunk, arg=2)
    yield "vmstate part", reseal(data, of_type(data, b"VMST"), arg=1)
    yield "vmstate end", reseal(data, of_type(data, b"VMST"), flags=0)
    for text in (b"[]", b"{", b"\xff", b"[" * 60, b'{"image_bytes": 3}'):
        yield f"stats {text[:4]}", reseal(data, stat, payload=text.ljust(stat.stored_bytes))
    changed = bytearray(data)
    for entry in (2**64 - 1, 1 << 39, (1 << 40) - 1 | 1 << 40, 3 << 40):
        struct.pack_into("<Q", changed, chunk.offset + RECORD.size, entry)
        yield f"map entry {entry:#x}", reseal(bytes(changed), chunk)


def believed(read, image):
    try:
        read(image)
    except ImageError:
        return False
    return True


@pytest.mark.parametrize("read", [read_everything, stream_everything])
def test_every_lie_is_found(read):
    assert believed(read, SAMPLE.data)
    assert len(list(lies())) > 150
    assert [what for what, image in lies() if believed(read, image)] == []


def test_no_lie_makes_the_reader_allocate():
    script = """
        import resource
        from test_corruption import lies, read_everything, stream_everything
        from snapengine.errors import ImageError
        images = list(lies())
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * 4096 + (48 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        found = 0
        for what, image in images:
            for read in (read_everything, stream_everything):
                try:
                    read(image)
                except ImageError:
                    found += 1
        assert found == 2 * len(images)
        print("found", found)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": ":".join(["tests", *filter(None, sys.path)]), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("found")


def file_header(**changes):
    names = ("magic", "major", "minor", "header_bytes", "features", "id", "parent", "reserved")
    fields = dict(zip(names, struct.unpack_from("<8sHHIQ16s16sI", SAMPLE.data), strict=True)) | changes
    head = struct.pack("<8sHHIQ16s16sI", *fields.values())
    return head + struct.pack("<I", crc32c_of(head)) + SAMPLE.data[64:]


@pytest.mark.parametrize("change", [{"major": 2}, {"features": 1}, {"features": 1 << 63}])
def test_a_newer_image_says_so(change):
    for read in (opened, stream_everything):
        with pytest.raises(UnsupportedVersionError, match=r"version 2|features 0x"):
            read(file_header(**change))


def test_a_newer_minor_version_is_read():
    with opened(file_header(minor=7)) as image:
        assert image.info()["format"] == "1.7"
        assert image.read("ram", 0, 4096) == SAMPLE.memory["ram"][:4096]


def test_an_unknown_encoding_or_record_is_a_newer_version():
    chunk, vmstate = of_type(SAMPLE.data, b"CHNK"), of_type(SAMPLE.data, b"VMST")
    for image in (
        reseal(SAMPLE.data, chunk, encoding=9),
        reseal(SAMPLE.data, vmstate, flags=4),
        reseal(SAMPLE.data, vmstate, type=b"NEWS"),
    ):
        for read in (read_everything, stream_everything):
            with pytest.raises(UnsupportedVersionError):
                read(image)
