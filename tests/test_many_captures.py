"""Hundreds of captures in one process, half of them cancelled: nothing is leaked, and no capture disturbs
the next one."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random

import pytest

import snapengine
from snapengine.errors import CaptureCancelled

pytestmark = pytest.mark.usefixtures("requires_uffd")
MIB = 1 << 20
LIBC = ctypes.CDLL(None)


class HeapUse(ctypes.Structure):
    """struct mallinfo2 (mallinfo(3))."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
        "keepcost",
    )]  # fmt: skip


def used_bytes() -> int:
    """Bytes in use on the C heap, without the free memory that its arenas keep."""
    gc.collect()
    use = LIBC.mallinfo2
    use.restype = HeapUse
    return int(use().uordblks + use().hblkhd)


def resident_bytes() -> int:
    LIBC.malloc_trim(0)  # free memory that the arenas of ended threads keep does not count
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def mappings() -> int:
    with open("/proc/self/maps", "rb") as file:
        return sum(1 for _ in file)


def captures(buffer, draw: random.Random, count: int) -> int:
    """Returns how many were cancelled in time."""
    cancelled = 0
    for _ in range(count):
        compress = draw.choice(["none", "zstd:1", "zstd:3"])
        threads = draw.randrange(3)
        capture = snapengine.snapshot(buffer, "null:", compress=compress, encoder_threads=threads)
        try:
            with capture:
                buffer[draw.randrange(len(buffer))] = draw.randrange(256)
                if draw.randrange(2):
                    capture.cancel()
        except CaptureCancelled:
            cancelled += 1
    return cancelled


def test_nothing_is_kept():
    draw = random.Random(3)
    buffer = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(4 * MIB))
    captures(buffer, draw, 40)
    before = used_bytes(), resident_bytes(), mappings()
    assert captures(buffer, draw, 120) > 10
    now = used_bytes(), resident_bytes(), mappings()
    assert now[0] - before[0] < MIB
    assert now[1] - before[1] < 8 * MIB
    assert now[2] - before[2] < 40  # a thread's arena is a few mappings, and there are few arenas
    buffer.close()


def test_a_cancelled_capture_is_not_in_the_way():
    """`cancel` returns at once; the next capture of the same memory waits until the memory is released."""
    buffer = mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(16 * MIB))
    for _ in range(8):
        first = snapengine.snapshot(buffer, "null:", rate_limit=MIB)
        first.start()
        first.cancel()
        with snapengine.snapshot(buffer, "null:"):
            pass
        assert first.wait(10)
        with pytest.raises(CaptureCancelled):
            assert first.result
    buffer.close()
