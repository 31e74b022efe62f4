"""One scan for many regions: each page is counted for its region; memory between regions for none."""

import ctypes
import mmap

import pytest

import snapengine
from snapengine.capture.region_plan import Plan
from snapengine.image import open_image
from snapengine.kernel.procmaps import read_maps
from snapengine.kernel.uffd import FEATURES
from snapengine.targets.buffer import BufferTarget

pytestmark = pytest.mark.usefixtures("requires_uffd")

PAGE = 4096
PIECES, EACH, GAP = 150, 3, 2  # more than a span holds: 64 regions, each at a page number of its own
STEP = (EACH + GAP) * PAGE
MAP_FIXED_NOREPLACE = 0x100000

libc = ctypes.CDLL(None, use_errno=True)
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p


@pytest.fixture
def pieces():
    """Buffers in separate mappings, with unmapped gaps between them: a page of data, a hole, a page of data.

    They are never unmapped: that could also unmap memory that other code has mapped between them.
    """
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    addr = libc.mmap(None, PIECES * STEP, protection, flags, -1, 0)
    starts = range(addr, addr + PIECES * STEP, STEP)
    for start in starts:
        assert libc.munmap(start + EACH * PAGE, GAP * PAGE) == 0
    buffers = {f"b{i}": (ctypes.c_char * (EACH * PAGE)).from_address(start) for i, start in enumerate(starts)}
    for number, piece in enumerate(buffers.values(), 1):
        piece[0] = piece[2 * PAGE] = bytes([number])
    return buffers


def fill_gaps(buffers):
    """Map memory with data right behind each piece, unless something else is mapped there by now."""
    filled = 0
    for piece in buffers.values():
        start = ctypes.addressof(piece) + EACH * PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        if libc.mmap(start, GAP * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == start:
            ctypes.memset(start, 0x5A, GAP * PAGE)
            filled += 1
    assert filled > PIECES // 2


def test_they_make_a_run(pieces):
    _, _, regions = BufferTarget(pieces).open(0)
    plan = Plan(regions, 0, FEATURES["PAGEFAULT_FLAG_WP"], mappings=read_maps())
    assert sum(item.follows for item in plan.regions) > PIECES // 2
    plan.close()


@pytest.mark.parametrize("arming", ["plain", "two-step"])
@pytest.mark.parametrize("filled", [False, True])
def test_each_page_in_its_region(pieces, tmp_path, arming, filled):
    target = BufferTarget(pieces, pause=lambda: filled and fill_gaps(pieces), resume=lambda: None)
    with snapengine.snapshot(target, tmp_path / "image", arming=arming) as capture:
        for piece in pieces.values():
            piece[0] = piece[PAGE] = b"\xff"
    result = capture.result
    assert (result.pages_saved, result.hole_pages, result.lost_pages) == (2 * PIECES, PIECES, 0)
    with open_image(tmp_path / "image") as image:
        for number in range(PIECES):
            page = bytes([number + 1]).ljust(PAGE, b"\0")
            assert image.read(f"b{number}", 0, EACH * PAGE) == page + bytes(PAGE) + page
