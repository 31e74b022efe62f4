"""Images as users see them: opening, reading, restoring, exporting, verifying, streaming."""

import errno
import io
import mmap
import os
import threading

import pytest
from image_kit import DATA, HOLE, LOST, ZERO, noise, of_type, opened, pattern, records, sample

from snapengine.base.checksum import crc32c_of
from snapengine.errors import CorruptImageError, ImageError, LostPagesError, SinkError, TruncatedImageError
from snapengine.export.raw import export_raw
from snapengine.image import open_image
from snapengine.image.encode import pack_entry
from snapengine.image.records import RECORD
from snapengine.image.stream import stream_image
from snapengine.image.writer import Writer
from snapengine.regions import Region
from snapengine.restore.stream import restore_stream
from snapengine.storage.sinks import MemorySink

SAMPLE = sample()


def built(regions, *chunks):
    sink = MemorySink()
    writer = Writer(sink)
    writer.begin(regions)
    for entries, data in chunks:
        writer.py_chunk(entries, data)
    writer.finish({})
    return sink.getvalue()


@pytest.fixture
def image():
    with opened(SAMPLE.data) as image:
        yield image


def test_info(image):
    info = image.info()
    assert info["id"] == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert info["parent"] is None
    assert info["encodings"] == {"raw": 2, "zstd": 1}
    assert info["vmstate"] == {"cpu": 9, "disk": 300 * 4096}
    assert info["file_bytes"] == len(SAMPLE.data) == info["stats"]["image_bytes"]
    assert [region["name"] for region in info["regions"]] == ["ram", "io"]
    assert info["regions"][1]["kind"] == "shared"


def test_read(image):
    ram, io_memory = SAMPLE.memory["ram"], SAMPLE.memory["io"]
    assert image.read("ram", 0, len(ram)) == ram
    assert image.read(1, 0, 6000) == image.read(image.regions[1], 0, 6000) == io_memory
    for offset, length in ((0, 0), (1, 1), (4095, 2), (2047, 3000), (5999, 1), (6000, 0)):
        assert image.read("io", offset, length) == io_memory[offset : offset + length]
    assert image.read_at(0x10FF0, 0x20) == ram[0xFF0:0x1010]
    assert dict(image.vmstate) == SAMPLE.vmstate


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (0, 6001), (6000, 1), (1 << 63, 1)])
def test_reading_outside_of_a_region(image, offset, length):
    with pytest.raises(ValueError, match="is not within"):
        image.read("io", offset, length)


def test_unknown_regions_and_addresses(image):
    for name in ("none", 2, -1):
        with pytest.raises(KeyError):
            image.read(name, 0, 1)
    for addr, length in ((0, 1), (0x10000 - 1, 2), (0x10000 + 40959, 2)):
        with pytest.raises(KeyError, match="not within one region"):
            image.read_at(addr, length)
    twice = [(Region("a", 0, 4096), 0), (Region("a", 8192, 4096), 1)]
    with opened(built(twice, ([(0, 2, ZERO)], b""))) as other, pytest.raises(KeyError, match="2 regions"):
        other.read("a", 0, 1)


def test_runs(image):
    assert list(image.runs("ram")) == [
        (0, 8192, "data"),
        (8192, 12288, "zero"),
        (20480, 4096, "hole"),
        (24576, 4096, "data"),
        (28672, 12288, "hole"),
    ]
    assert list(image.runs("io")) == [(0, 6000, "data")]


@pytest.mark.parametrize("threads", [1, 3])
def test_restore_into(image, threads):
    for name, memory in SAMPLE.memory.items():
        buffer = bytearray(b"\xaa" * len(memory))
        image.restore_into(name, buffer, threads=threads)
        assert buffer == memory
        part = bytearray(3000)
        image.restore_into(name, part, offset=2500, fresh=True, threads=threads)
        assert part == memory[2500:5500]
    with pytest.raises(ValueError, match="is not within"):
        image.restore_into("io", bytearray(6001))
    with pytest.raises((BufferError, TypeError, ValueError)):
        image.restore_into("io", bytes(6000))


def test_restore_into_a_mapping(image):
    with mmap.mmap(-1, 40960) as memory:
        image.restore_into("ram", memory, fresh=True)
        assert memory[:] == SAMPLE.memory["ram"]


def test_restore_memfd_keeps_holes(image):
    fd = image.restore_memfd("ram")
    try:
        assert os.fstat(fd).st_size == 40960
        assert os.fstat(fd).st_blocks * 512 == 3 * 4096
        assert os.lseek(fd, 8192, os.SEEK_DATA) == 24576
        assert os.pread(fd, 50000, 0) == SAMPLE.memory["ram"]
    finally:
        os.close(fd)


def allocated(path):
    return os.stat(path).st_blocks * 512


def test_export_raw(image, tmp_path):
    path = tmp_path / "ram.raw"
    assert export_raw(image, path, "ram") == 40960
    assert path.read_bytes() == SAMPLE.memory["ram"]
    sparse = allocated(path)
    assert export_raw(image, path, "ram", zeros="write") == 40960
    assert path.read_bytes() == SAMPLE.memory["ram"]
    assert allocated(path) == sparse + 3 * 4096
    assert export_raw(image, path) == 46960
    assert path.read_bytes() == SAMPLE.memory["ram"] + SAMPLE.memory["io"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["ram.raw"]


def test_a_failed_export_leaves_nothing(tmp_path):
    chunk = of_type(SAMPLE.data, b"CHNK", 1)
    damaged = bytearray(SAMPLE.data)
    damaged[chunk.payload_offset + 3] ^= 1
    with opened(bytes(damaged)) as image:
        with pytest.raises(CorruptImageError):
            export_raw(image, tmp_path / "a.raw")
        with pytest.raises(SinkError):
            export_raw(image, tmp_path, "ram")
    assert list(tmp_path.iterdir()) == []


def test_verify(image):
    report = image.verify()
    assert (report.records, report.chunks, report.file_bytes) == (10, 3, len(SAMPLE.data))
    assert report.region_bytes == 46960
    assert (report.data_pages, report.zero_pages, report.hole_pages, report.lost_pages) == (5, 3, 4, 0)
    assert report.duplicate_pages == 1
    assert report.vmstate_bytes == 9 + 300 * 4096


def test_lost_pages():
    data = built([(Region("a", 0, 3 * 4096), 0)], ([(0, 1, DATA), (1, 1, LOST), (2, 1, ZERO)], noise(1, 1)))
    with opened(data) as image:
        assert image.verify().lost_pages == 1
        assert image.read("a", 0, 4096) == noise(1, 1)
        assert image.read("a", 8192, 4096) == bytes(4096)
        for call in (lambda: image.read("a", 4095, 2), lambda: image.restore_memfd("a")):
            with pytest.raises(LostPagesError, match=r"offset 0x1000 .address 0x1000. was lost"):
                call()


def test_lost_pages_as_zeros(tmp_path):
    data = built([(Region("a", 0, 3 * 4096), 0)], ([(0, 1, DATA), (1, 1, LOST), (2, 1, ZERO)], noise(1, 1)))
    memory = noise(1, 1) + bytes(8192)
    with open_image(io.BytesIO(data), lost="zero") as image:
        assert image.lost_pages() == 1
        assert image.verify().lost_pages == 1
        buffer = bytearray(b"x" * len(memory))
        image.restore_into("a", buffer)
        assert buffer == memory
        with open(image.restore_memfd("a"), "rb") as file:
            assert file.read() == memory
        for zeros in ("sparse", "write"):
            export_raw(image, tmp_path / "raw", zeros=zeros)
            assert (tmp_path / "raw").read_bytes() == memory
    with pytest.raises(ValueError, match="'keep' is neither"):
        open_image(io.BytesIO(data), lost="keep")


def test_an_image_without_regions_or_chunks():
    with opened(built([])) as image:
        assert image.regions == []
        assert image.verify().records == 4
        assert list(image.vmstate) == []
    empty = built([(Region("a", 0, 4096), 0)])
    with opened(empty) as image, pytest.raises(ImageError, match="not in the image"):
        image.read("a", 0, 1)


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        (b"", TruncatedImageError, "empty or too short"),
        (b"\x89SNPE", TruncatedImageError, "empty or too short"),
        (b"#!/bin/sh\necho hello\n", CorruptImageError, "not a snapengine image"),
        (bytes(100000), CorruptImageError, "not a snapengine image"),
        (SAMPLE.data[:-120], TruncatedImageError, "never completed"),
    ],
)
def test_what_is_no_image_says_so_in_one_line(tmp_path, content, error, text):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(error, match=text) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_says_so(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory, not an image"):
        open_image(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        open_image(tmp_path / "none")
    assert caught.value.errno == errno.ENOENT
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="stream_image"):
        open_image(tmp_path / "pipe")


def test_close_is_idempotent_and_leaks_nothing(tmp_path):
    path = tmp_path / "a.snap"
    path.write_bytes(SAMPLE.data)
    before = len(os.listdir("/proc/self/fd"))
    for content in (SAMPLE.data, SAMPLE.data[:500]):
        path.write_bytes(content)
        try:
            image = open_image(path)
        except ImageError:
            continue
        image.close()
        image.close()
    with open(path, "rb") as file, pytest.raises(ImageError):
        open_image(file)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = tmp_path / "a.snap"
    path.write_bytes(SAMPLE.data)
    with open_image(path) as image:
        os.truncate(path, 700)
        with pytest.raises(TruncatedImageError, match="was truncated"):
            image.read("io", 0, 1)
        with pytest.raises(TruncatedImageError):
            image.verify()


def test_several_threads_may_read_one_image(image):
    wrong = []

    def work():
        for _ in range(30):
            for name, memory in SAMPLE.memory.items():
                if image.read(name, 0, len(memory)) != memory:
                    wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def with_record(data, record):
    """An image with one more record before the STAT, and with correct offsets, counts and checksums."""
    at = of_type(data, b"STAT").offset
    head = bytearray(data[:at] + record)
    for old in records(data):
        if old.offset >= at:
            head += resequenced(data, old, len(record), len(head))
    return bytes(head)


def resequenced(data, old, shift, offset):
    payload = bytearray(data[old.payload_offset : old.end])
    if old.type == b"STAT":
        text = bytes(payload).replace(str(len(data)).encode(), str(len(data) + shift).encode())
        payload = bytearray(text[: len(payload)].ljust(len(payload)))
    if old.type == b"TRLR":
        for position, step in ((8, shift), (16, shift), (24, 1), (48, shift)):
            value = int.from_bytes(payload[position : position + 8], "little") + step
            payload[position : position + 8] = value.to_bytes(8, "little")
    return packed(old.type, old.seq + 1, bytes(payload), flags=old.flags, arg=old.arg)


def packed(kind, seq, payload, *, flags=0, arg=0, meta=b""):
    fields = (kind, 0, flags, len(payload), len(payload), len(meta), arg, seq, crc32c_of(payload))
    head = RECORD.pack(*fields, 0)[:-4]
    return head + crc32c_of(meta, crc32c_of(head)).to_bytes(4, "little") + meta + payload


@pytest.mark.parametrize("size", [0, 100, 5 << 20])
def test_an_unknown_record_that_may_be_ignored_is(size):
    seq = of_type(SAMPLE.data, b"STAT").seq
    data = with_record(SAMPLE.data, packed(b"NEWS", seq, bytes(size), flags=1 << 15, meta=b"meta"))
    with opened(data) as image:
        assert image.verify().records == 11
        assert image.read("ram", 0, 40960) == SAMPLE.memory["ram"]
    buffers = {}
    restore_stream(io.BytesIO(data), lambda region: buffers.setdefault(region.name, bytearray(region.length)))
    assert buffers == SAMPLE.memory
    if size:
        damaged = bytearray(data)
        damaged[of_type(data, b"NEWS").end - 1] ^= 1
        with opened(bytes(damaged)) as image, pytest.raises(CorruptImageError, match="NEWS"):
            image.verify()
        with pytest.raises(CorruptImageError):
            list(stream_image(io.BytesIO(bytes(damaged))))


class OnePipe(io.RawIOBase):
    """Returns at most 1000 bytes per read, and cannot seek."""

    def __init__(self, data):
        self.rest = data

    def readable(self):
        return True

    def read(self, count=-1):
        part, self.rest = self.rest[: min(count, 1000)], self.rest[min(count, 1000) :]
        return part


def test_stream_image():
    stream = stream_image(OnePipe(SAMPLE.data))
    assert [(region.name, region.length) for region in stream.regions] == [("ram", 40960), ("io", 6000)]
    items = list(stream)
    assert [pack_entry(*item[:3]) for item in items] == [
        pack_entry(*entry)
        for entry in [(0, 2, DATA), (2, 3, ZERO), (5, 5, HOLE), (512, 2, DATA), (6, 1, DATA), (1, 1, DATA)]
    ]
    assert bytes(items[0].data) == noise(2, 1)
    assert bytes(items[3].data) == pattern(2, 7)
    assert stream.vmstate == SAMPLE.vmstate
    assert stream.stats["method"] == "write-tracking"


def test_restore_stream_leaves_out_what_is_not_wanted():
    buffer = bytearray(6000)
    stream = restore_stream(OnePipe(SAMPLE.data), lambda region: buffer if region.name == "io" else None)
    assert buffer == SAMPLE.memory["io"]
    assert str(stream.id).startswith("00010203")
    with pytest.raises(ValueError, match="5 bytes instead of 40960"):
        restore_stream(OnePipe(SAMPLE.data), lambda region: bytearray(5))
