"""PAGEMAP_SCAN: exact regions for any number of them, and the meaning of the categories."""

import ctypes
import mmap
import os

import pytest

from snapengine.kernel.pagemap import CATEGORIES, CHECK_WPASYNC, WP_MATCHING, has_pagemap_scan, scan
from snapengine.kernel.uffd import FEATURES, Uffd

pytestmark = pytest.mark.usefixtures("requires_uffd")

PAGE = 4096
HUGE = 2 << 20
WRITTEN, PRESENT, PFNZERO = (CATEGORIES[name] for name in ("WRITTEN", "PRESENT", "PFNZERO"))


class Memory:
    """Private pages of this process, by address; `huge` asks for transparent huge pages, aligned."""

    def __init__(self, pages, huge=False):
        self._map = mmap.mmap(-1, pages * PAGE + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))  # the export ends at once
        self.start = -(-base // HUGE) * HUGE
        self._offset = self.start - base
        self.end = self.start + pages * PAGE

    def write(self, page, byte=1):
        self._map[self._offset + page * PAGE] = byte

    def unmap(self):
        self._map.close()

    def read(self, page):
        return self._map[self._offset + page * PAGE]


@pytest.fixture
def pagemap():
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def logged():
    """``logged(memory)``: registered for asynchronous write protection, and protected."""
    made = []

    def start(memory):
        uffd = Uffd(FEATURES["PAGEFAULT_FLAG_WP"] | FEATURES["WP_ASYNC"] | FEATURES["WP_UNPOPULATED"])
        made.append(uffd)
        uffd.register(memory.start, memory.end - memory.start)
        uffd.protect(memory.start, memory.end - memory.start)

    yield start
    for uffd in made:
        uffd.close()


def spans(memory, regions):
    """The regions as (first page, pages)."""
    return [((start - memory.start) // PAGE, (end - start) // PAGE) for start, end, _ in regions]


def test_this_kernel_has_it():
    assert has_pagemap_scan() is True


@pytest.mark.parametrize("written", [0, 1, 511, 512, 513, 1024, 1025, 1600])
def test_every_second_page(pagemap, logged, written):
    """More regions than one call returns (512): between two calls none is lost or returned twice."""
    memory = Memory(3300)
    logged(memory)
    pages = [2 * n + 1 for n in range(written)]
    for page in pages:
        memory.write(page)
    found = scan(pagemap, memory.start, memory.end, mask=WRITTEN)
    assert spans(memory, found) == [(page, 1) for page in pages]
    assert all(categories == WRITTEN for _, _, categories in found)


def test_a_dirty_log_over_many_rounds(pagemap, logged):
    """Scan and protect again in one step: each round returns exactly the pages written since the last one."""
    memory = Memory(2400)
    logged(memory)
    for step in (1, 2, 3, 7):
        pages = list(range(step, 2400, step + 1))
        for page in pages:
            memory.write(page, step)
        found = scan(
            pagemap, memory.start, memory.end, flags=WP_MATCHING | CHECK_WPASYNC, mask=WRITTEN, anyof=PRESENT
        )
        assert spans(memory, found) == [(page, 1) for page in pages]
        assert scan(pagemap, memory.start, memory.end, mask=WRITTEN) == []


def test_neighbours_are_one_region(pagemap):
    memory = Memory(4096)
    for page in range(100, 3000):
        memory.write(page)
    assert spans(memory, scan(pagemap, memory.start, memory.end, mask=PRESENT)) == [(100, 2900)]


def test_part_of_a_range(pagemap):
    memory = Memory(64)
    for page in range(64):
        memory.write(page)
    assert scan(pagemap, memory.start + 8 * PAGE, memory.start + 12 * PAGE, mask=PRESENT) == [
        (memory.start + 8 * PAGE, memory.start + 12 * PAGE, PRESENT)
    ]
    assert scan(pagemap, memory.start, memory.start, mask=PRESENT) == []


def test_holes_zero_pages_and_written_ones(pagemap):
    memory = Memory(6)
    memory.write(1)
    assert memory.read(3) == 0  # maps the shared zero page
    found = scan(pagemap, memory.start, memory.end, anyof=PRESENT | WRITTEN, returned=PRESENT | PFNZERO)
    kinds = {page: categories for start, end, categories in found for page in range(
        (start - memory.start) // PAGE, (end - memory.start) // PAGE)}  # fmt: skip
    assert kinds[1] == PRESENT
    assert kinds[3] == PRESENT | PFNZERO
    assert all(not kinds.get(page, 0) & PRESENT for page in (0, 2, 4, 5))
    assert spans(memory, scan(pagemap, memory.start, memory.end, mask=PRESENT)) == [(1, 1), (3, 1)]


def test_a_scan_populates_nothing(pagemap):
    memory = Memory(2048)
    for _ in range(2):
        assert scan(pagemap, memory.start, memory.end, mask=PRESENT) == []


def test_huge_pages(pagemap):
    with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as knob:
        assert "[never]" not in knob.read(), "this host has no transparent huge pages"
    memory = Memory(3 * 512, huge=True)
    memory.write(512 + 7)
    huge = CATEGORIES["HUGE"]
    found = scan(pagemap, memory.start, memory.end, mask=PRESENT, returned=PRESENT | huge)
    assert spans(memory, found) == [(512, 512)]
    assert [categories for _, _, categories in found] == [PRESENT | huge]


def test_an_unmapped_range_is_empty(pagemap):
    memory = Memory(16)
    memory.write(0)
    memory.unmap()
    assert scan(pagemap, memory.start, memory.end, mask=PRESENT) == []


def test_new_memory_in_the_range_is_an_error(pagemap, logged):
    """CHECK_WPASYNC: without it, memory that is mapped over tracked memory would be silently skipped."""
    memory = Memory(16)
    with pytest.raises(OSError, match="PAGEMAP_SCAN") as caught:
        scan(pagemap, memory.start, memory.end, flags=WP_MATCHING | CHECK_WPASYNC, mask=WRITTEN)
    assert caught.value.errno == 1
    logged(memory)
    assert scan(pagemap, memory.start, memory.end, flags=WP_MATCHING | CHECK_WPASYNC, mask=WRITTEN) == []


def test_bad_arguments(pagemap):
    with pytest.raises(OSError, match="PAGEMAP_SCAN"):
        scan(-1, 0, PAGE, mask=PRESENT)
    with pytest.raises(OSError, match="PAGEMAP_SCAN"):
        scan(pagemap, 1, PAGE, mask=PRESENT)
    with pytest.raises(OSError, match="PAGEMAP_SCAN"):
        scan(pagemap, 0, PAGE, mask=1 << 40)
