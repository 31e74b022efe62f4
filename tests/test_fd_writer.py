"""Files on a disk: writeback starts before the end, and does not change the content."""

import ctypes
import os

import pytest
from image_kit import DATA

from snapengine.image.writer import Writer
from snapengine.regions import Region
from snapengine.storage.sinks import FdSink, MemorySink, open_sink

MIB = 1 << 20
CACHESTAT = 451  # Linux 6.5


def cachestat(fd, length):
    """(pages in the cache, dirty pages) of the file's first bytes; skips without cachestat(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    span, counts = (ctypes.c_uint64 * 2)(0, length), (ctypes.c_uint64 * 5)()
    if libc.syscall(CACHESTAT, fd, span, counts, 0) != 0:
        pytest.skip(f"no cachestat(2): {os.strerror(ctypes.get_errno())}")
    return counts[0], counts[1]


def write_chunks(sink, count):
    """An image of `count` chunks of 1 MiB, not committed."""
    writer = Writer(sink)
    writer.begin([(Region("ram", 1 << 32, count * MIB), 0)])
    for number in range(count):
        writer.py_chunk([(number * 256, 256, DATA)], bytes([number + 1]) * MIB)
    writer.finish({})


def test_the_disk_begins_before_the_end(tmp_path):
    sink = open_sink(tmp_path / "image")
    write_chunks(sink, 20)
    cached, dirty = cachestat(sink.fd, 8 * MIB)
    sink.commit()
    if not cached:
        pytest.skip("this file system does not use the page cache")
    assert cached == 2048
    assert dirty < 1024


def test_a_file_that_is_written_from_its_middle(tmp_path):
    """Starting the writeback must not move the file position."""
    path = tmp_path / "image"
    path.write_bytes(b"before" * 1000)
    fd = os.open(path, os.O_RDWR)
    try:
        os.lseek(fd, 100, os.SEEK_SET)
        sink, whole = FdSink(fd), MemorySink()
        for each in (sink, whole):
            write_chunks(each, 20)
            each.commit()
        assert os.lseek(fd, 0, os.SEEK_CUR) == 100 + len(whole.getvalue())
    finally:
        os.close(fd)
    content = path.read_bytes()
    assert content[:100] == (b"before" * 1000)[:100]
    assert len(content) == 100 + len(whole.getvalue())
    assert all(content.count(bytes([number + 1]) * MIB) == 1 for number in range(20))
