"""Two-step arming: the image has the writes between the first protection and T, and none after T.

`pause` of a target runs between the two steps, so a test can write exactly there.
"""

import ctypes
import mmap
import os
import threading

import pytest
from capturekit import anonymous, saved, snap
from test_consistency import snap as snap_guest
from waitkit import PATIENCE_S, attempts

import snapengine
from snapengine.capture.capture import Capture
from snapengine.errors import CaptureCancelled
from snapengine.guest.params import GuestParams
from snapengine.image import open_image
from snapengine.kernel.procmaps import read_maps
from snapengine.options import Options

pytestmark = pytest.mark.usefixtures("requires_uffd")

PAGE = 4096
MIB = 1 << 20
SIZE = 8 * MIB
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS


class UnprotectedCapture(Capture):
    """Negative control: pages that were written to before T are not protected again."""

    _session_extra = {"skip_reprotect": True}  # noqa: RUF012


def paused(memory, between):
    """A target whose pause calls `between`."""
    return snapengine.BufferTarget(memory, pause=between, resume=lambda: None)


def save(memory, path, between, inside=None):
    return snap(paused(memory, between), path, inside, arming="two-step")


def fill(memory, value=1):
    memory[:] = bytes([value]) * len(memory)


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_writes_between_the_steps_are_in_the_image_and_later_ones_are_not(tmp_path, flags):
    memory = anonymous(SIZE, flags)
    fill(memory)
    pages = [0, 1, 7, 64, 130, 511, 512, SIZE // PAGE - 1]

    def between():
        for page in pages:
            memory[page * PAGE] = 2

    expected = bytearray(memory)
    for page in pages:
        expected[page * PAGE] = 2
    result = save(memory, tmp_path / "image", between, lambda: fill(memory, 3))
    assert saved(tmp_path / "image") == expected
    assert result.arming_faults >= len(pages) - 4  # the fault handling includes neighbouring pages
    assert 0 < result.pause_ns < result.arm_ns
    assert memory[:] == b"\3" * SIZE


@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
def test_a_hole_that_fills_between_the_steps_is_data(tmp_path, flags):
    memory = anonymous(SIZE, flags)
    memory[: 4 * PAGE] = b"\1" * 4 * PAGE

    def between():
        memory[100 * PAGE] = 2
        assert memory[200 * PAGE] == 0  # a read makes a zero page

    result = save(memory, tmp_path / "image", between, lambda: memory.__setitem__(300 * PAGE, 3))
    image = saved(tmp_path / "image")
    assert image[100 * PAGE] == 2
    assert image[300 * PAGE] == 0
    assert result.pages_saved == 5
    # The page that was read; and in shared memory the kernel allocates a page before the write faults.
    assert result.zero_pages <= 2
    assert result.lost_pages == 0


def test_what_is_discarded_between_the_steps_is_a_hole(tmp_path):
    memory = anonymous(SIZE)
    fill(memory)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    discarded = [(3, 1), (600, 512), (1500, 100)]

    def between():
        memory[3 * PAGE] = 2
        for page, count in discarded:
            memory.madvise(mmap.MADV_DONTNEED, page * PAGE, count * PAGE)
        memory[601 * PAGE] = 7

    result = save(memory, tmp_path / "image", between)
    expected = bytearray(b"\1" * SIZE)
    for page, count in discarded:
        expected[page * PAGE : (page + count) * PAGE] = bytes(count * PAGE)
    expected[601 * PAGE] = 7
    assert saved(tmp_path / "image") == expected
    assert result.hole_pages == sum(count for _, count in discarded) - 1
    assert result.lost_pages == 0


def test_memory_that_is_replaced_between_the_steps_is_lost(tmp_path):
    """A new mapping in its place is not protected: whether its content changed after T cannot be known."""
    memory = anonymous(SIZE)
    fill(memory)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mmap.restype = ctypes.c_void_p
    fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED

    def between():
        assert libc.mmap(addr + MIB, MIB, mmap.PROT_READ | mmap.PROT_WRITE, fixed, -1, 0) == addr + MIB
        ctypes.memset(addr + MIB, 9, MIB)

    result = save(memory, tmp_path / "image", between)
    assert result.lost_runs == [(addr + MIB, MIB)]
    with open_image(tmp_path / "image") as image:
        assert image.read(image.regions[0], 0, MIB) == b"\1" * MIB
        with pytest.raises(snapengine.LostPagesError):
            image.read(image.regions[0], MIB, MIB)


def huge_bytes(addr):
    """AnonHugePages of the mapping at `addr`."""
    inside = False
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            head = line.split()[0]
            if not head.endswith(":"):
                start, end = (int(part, 16) for part in head.split("-"))
                inside = start <= addr < end
            elif inside and head == "AnonHugePages:":
                return int(line.split()[1]) << 10
    raise AssertionError("not mapped")


@pytest.mark.host_optional
def test_huge_pages_that_are_hit_stay_whole(tmp_path):
    memory = anonymous(SIZE + 2 * MIB)
    memory.madvise(mmap.MADV_HUGEPAGE)
    fill(memory)
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    before = huge_bytes(addr)
    if before < 6 * MIB:
        pytest.skip("the kernel gave no huge pages")
    offset = -addr % (2 * MIB)

    def between():
        memory[offset + 5 * PAGE] = 2

    save(memory, tmp_path / "image", between)
    image = saved(tmp_path / "image")
    assert image[offset + 5 * PAGE] == 2
    assert image.count(b"\2") == 1
    assert huge_bytes(addr) == before


def test_a_child_that_is_forked_between_the_steps_writes_no_later_bytes(tmp_path):
    memory = anonymous(SIZE, SHARED)
    fill(memory)
    go_read, go_write = os.pipe()
    children = []

    def between():
        memory[40 * PAGE] = 2  # written to in the parent before the fork
        child = os.fork()
        if child == 0:
            memory[80 * PAGE] = 2  # written to in the child before T
            os.read(go_read, 1)
            memory[40 * PAGE] = memory[80 * PAGE] = memory[120 * PAGE] = 9
            os._exit(0)
        children.append(child)
        while memory[80 * PAGE] != 2:
            pass

    def inside():
        os.write(go_write, b"x")
        assert os.waitpid(children[0], 0)[1] == 0

    save(memory, tmp_path / "image", between, inside)
    image = saved(tmp_path / "image")
    assert (image[40 * PAGE], image[80 * PAGE], image[120 * PAGE]) == (2, 2, 1)
    assert memory[120 * PAGE] == 9


def test_a_pause_that_waits_for_a_writer_is_not_kept_waiting(tmp_path):
    """A writer that faulted is released before T; otherwise the pause would wait for it for ever."""
    memory = anonymous(SIZE)
    fill(memory)
    stop, stopped = threading.Event(), threading.Event()

    def write():
        page = 0
        while not stop.is_set():
            memory[page * PAGE] = 4
            page = (page + 97) % (SIZE // PAGE)
        stopped.set()

    thread = threading.Thread(target=write)
    thread.start()

    def between():
        stop.set()
        assert stopped.wait(PATIENCE_S)

    try:
        save(memory, tmp_path / "image", between, lambda: fill(memory, 5))
    finally:
        stop.set()
        thread.join()
    assert set(saved(tmp_path / "image")) <= {1, 4}


def test_a_failure_between_the_steps_releases_everything(tmp_path):
    memory = anonymous(SIZE)
    fill(memory)

    def fail():
        memory[0] = 2
        raise OSError(5, "no pause today")

    with pytest.raises(OSError, match="no pause today"):
        save(memory, tmp_path / "image", fail)
    assert not list(tmp_path.iterdir())
    fill(memory, 3)  # would block for ever if still protected
    addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    snap(memory, tmp_path / "image", arming="plain")  # no other userfaultfd has it registered
    assert any(mapping.start <= addr < mapping.end for mapping in read_maps("self"))


def test_cancelled_between_the_steps(tmp_path):
    memory = anonymous(SIZE)
    fill(memory)
    captures = []

    def between():
        captures[0].cancel()

    capture = snapengine.snapshot(paused(memory, between), tmp_path / "image", arming="two-step")
    captures.append(capture)
    with pytest.raises(CaptureCancelled), capture:
        pass
    fill(memory, 2)


def test_which_arming_is_chosen(tmp_path):
    calls = []
    memory = anonymous(80 * MIB)
    fill(memory)
    for arming, two in (("auto", True), ("plain", False)):
        target = paused(memory, lambda: calls.append(memory.__setitem__(0, 1)))
        with snapengine.snapshot(target, "null:", arming=arming) as capture:
            pass
        assert (capture.result.arming_faults == 1) == two
        assert (capture.result.pause_ns < capture.result.arm_ns) == two
    with pytest.raises(ValueError, match="arming"):
        Options(arming="both")


@pytest.mark.negative_control
@pytest.mark.parametrize("pattern", ["uniform", "sequential"])
def test_a_missing_second_protection_is_noticed(guest, tmp_path, pattern):
    params = GuestParams(size=32 * MIB, threads=1, pattern=pattern)
    with guest(params) as socket:
        for _ in attempts("the oracle accepts cuts with unprotected pages"):
            _, report = snap_guest(socket, tmp_path / "image", UnprotectedCapture, arming="two-step")
            if not report.consistent:
                break
