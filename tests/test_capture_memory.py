"""Captures of memory that is forked, discarded, sparse, or in huge pages."""

import ctypes
import gc
import mmap
import os
from pathlib import Path

import pytest
from capturekit import anonymous, saved, snap
from gatekit import GatedFile

import snapengine
from snapengine.image import open_image
from snapengine.storage.sinks import NullSink

MIB = 1 << 20
PAGE = 4096
MAP_NORESERVE = 0x4000
pytestmark = pytest.mark.usefixtures("requires_uffd")


def gated(buffer, path, inside):
    """A capture whose walk waits for free buffers until `inside` has returned."""
    sink = GatedFile(path)

    def meanwhile():
        try:
            inside()
        finally:
            sink.gate.set()

    return snap(buffer, sink, meanwhile, memory_limit=16 * MIB)


def test_fork_of_private_memory_during_a_snapshot(tmp_path):
    """The child has its own copy: it may write, and the parent's image does not see it."""
    buffer = anonymous(8 * MIB)
    buffer[:] = b"p" * len(buffer)
    status = []

    def fork():
        child = os.fork()
        if child == 0:
            buffer[:] = b"c" * len(buffer)
            os._exit(buffer[0] != ord("c"))
        buffer[:PAGE] = b"q" * PAGE
        status.append(os.waitpid(child, 0)[1])

    snap(buffer, tmp_path / "image", fork, rate_limit=32 * MIB)
    assert status == [0]
    assert saved(tmp_path / "image") == b"p" * len(buffer)


def test_fork_of_shared_memory_during_a_snapshot(tmp_path):
    """The child writes to the same pages: its writes are tracked too (UFFD_FEATURE_EVENT_FORK)."""
    buffer = anonymous(48 * MIB, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    buffer[:] = b"p" * len(buffer)
    status = []

    def fork():
        child = os.fork()
        if child == 0:
            buffer[:] = b"c" * len(buffer)
            os._exit(buffer[0] != ord("c"))
        status.append(os.waitpid(child, 0)[1])

    result = gated(buffer, tmp_path / "image", fork)
    assert status == [0]
    assert buffer[:] == b"c" * len(buffer)
    assert saved(tmp_path / "image") == b"p" * len(buffer)
    assert result.faults > 0


def test_memory_discarded_before_it_was_saved_is_reported(tmp_path):
    """madvise(MADV_DONTNEED) after T: the content is discarded before the walk reaches it."""
    buffer = anonymous(64 * MIB)
    buffer.madvise(mmap.MADV_NOHUGEPAGE)
    buffer[:] = b"d" * len(buffer)

    def discard():
        buffer.madvise(mmap.MADV_DONTNEED, 48 * MIB, 16 * MIB)

    result = gated(buffer, tmp_path / "image", discard)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    assert result.lost_pages > 0
    assert result.lost_pages * PAGE == sum(length for _, length in result.lost_runs)
    assert all(48 * MIB <= start - address < 64 * MIB for start, _ in result.lost_runs)
    with open_image(tmp_path / "image") as image:
        start, length = result.lost_runs[0]
        with pytest.raises(snapengine.LostPagesError):
            image.read_at(start, length)
        assert image.read(0, 0, 32 * MIB) == b"d" * (32 * MIB)


def test_sparse_memory_is_armed_without_page_tables(tmp_path):
    """64 GiB of address space, 256 MiB written: no marker, page table or page is allocated for the holes."""
    size = 64 << 30
    buffer = anonymous(size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    for part in range(16):
        buffer.seek(part * (4 << 30))
        buffer.write(b"s" * (16 * MIB))
    before = page_table_kib()
    with snapengine.snapshot(buffer, NullSink()) as capture:
        while capture.progress().phase != "done" and not capture.wait(0.01):
            pass
        grown = page_table_kib() - before
    assert capture.result.hole_pages == (size - 256 * MIB) // PAGE
    assert capture.result.pages_saved == 256 * MIB // PAGE
    assert grown < 16 << 10


def test_sparse_shared_memory_is_armed_without_page_tables():
    size = 64 << 30
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, size)
    with mmap.mmap(fd, size) as buffer:
        for part in range(8):
            buffer.seek(part * (8 << 30))
            buffer.write(b"s" * (2 * MIB))
        before, blocks = page_table_kib(), os.fstat(fd).st_blocks
        holes = []

        def touch():
            buffer[3 << 30] = 1  # a hole: not in the image, and it may be written
            holes.append(buffer[3 << 30])

        with snapengine.snapshot(buffer, NullSink()) as capture:
            touch()
        assert holes == [1]
        assert capture.result.pages_saved == 16 * MIB // PAGE
        assert capture.result.hole_pages == (size - 16 * MIB) // PAGE
        assert page_table_kib() - before < 16 << 10
        assert os.fstat(fd).st_blocks - blocks <= 8 * 2
    os.close(fd)


def page_table_kib():
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmPTE")).split()[1])


def huge_kib(address):
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0] and not line.split()[0].endswith(":"):
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = start <= address < end
            elif inside and line.startswith("AnonHugePages"):
                return int(line.split()[1])
    return 0


def test_huge_pages_survive(tmp_path):
    buffer = anonymous(32 * MIB)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer[:] = b"h" * len(buffer)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    gc.collect()
    before = huge_kib(address)
    assert before >= 16 << 10, "this kernel gave no huge pages"
    result = snap(buffer, tmp_path / "image", lambda: buffer.__setitem__(9 * MIB, 1))
    assert huge_kib(address) == before
    assert result.faults <= 1
    assert saved(tmp_path / "image") == b"h" * len(buffer)


def test_a_slow_sink_makes_no_huge_page_spill_that_nobody_writes_to(tmp_path):
    buffer = anonymous(48 * MIB)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer[:] = b"h" * len(buffer)
    result = snap(buffer, tmp_path / "image", memory_limit=16 * MIB, rate_limit=96 * MIB)
    assert result.spilled_bytes == 0
    assert result.pages_saved == len(buffer) // PAGE


def test_the_histogram_has_every_fault(tmp_path):
    """Both in the result and in the image's figures, which `snapengine info --json` prints."""
    buffer = anonymous(32 * MIB)
    buffer.madvise(mmap.MADV_NOHUGEPAGE)
    buffer[:] = b"h" * len(buffer)

    def scribble():
        for page in range(len(buffer) // PAGE - 1, 0, -5):
            buffer[page * PAGE] = 1

    result = gated(buffer, tmp_path / "image", scribble)
    floors, counts = zip(*result.fault_histogram, strict=True)
    assert list(floors) == sorted(set(floors))
    assert all(counts)
    assert sum(counts) == result.faults > 0
    assert floors[-1] <= result.fault_ns["max"] < 1.13 * max(floors[-1], 8)
    assert floors[0] <= result.fault_ns["p50"] <= result.fault_ns["p99"]
    with open_image(tmp_path / "image") as image:
        assert image.stats["fault_histogram"] == [list(pair) for pair in result.fault_histogram]
