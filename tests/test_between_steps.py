"""Two-step arming while the memory changes: the image is the state at T, or lists what is lost.

`pause` of a target runs between the two steps, and `resume` after T and before the walk. So the tests know
the state at T byte by byte.
"""

import ctypes
import mmap
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
from capturekit import anonymous, saved, snap
from orderkit import OrderTarget
from patientkit import PeerTarget, ProcessTarget
from targetkit import MEMORY, SOURCES
from test_peer import peer
from test_process_lost import FIRST, MAP_A_FILE, MIB, N_PAGES, PAGE, REMOVE, UNMAP, Victim

import snapengine
from snapengine.errors import TargetGoneError
from snapengine.image import open_image
from snapengine.image.encode import DATA, HOLE, LOST

pytestmark = pytest.mark.usefixtures("requires_uffd")

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
FIXED = 0x10
UNIT = 2 * MIB
TOUCH = 14  # targets/victim.c
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mmap.restype = ctypes.c_void_p


def address(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def save(memory, path, between, after=lambda: None, **options):
    target = snapengine.BufferTarget(memory, pause=between, resume=after)
    return snap(target, path, arming="two-step", **options)


def hooked(kind):
    """A target of that class that calls `between` and `after` around T; the target itself keeps running."""

    class Hooked(kind):
        can_pause = property(lambda self: True, lambda self, value: None)

        def __init__(self, where, between, after=lambda: None, **fields):
            super().__init__(where, **fields)
            self.pause, self.resume = between, after

    return Hooked


Between, PeerBetween = hooked(ProcessTarget), hooked(PeerTarget)


def test_a_hole_in_which_buffers_meet(tmp_path):
    """A fault names one page. The page is data in every buffer that has bytes in it."""
    memory = anonymous(8 * PAGE)
    cuts = [0, PAGE + 100, 3 * PAGE + 50, 3 * PAGE + 60, 8 * PAGE - 10]
    buffers = {f"b{i}": memoryview(memory)[cuts[i] : cuts[i + 1]] for i in (2, 0, 3, 1)}
    memory[2 * PAGE] = 1  # the others are not even read: a read would make a zero page
    state = bytearray(len(memory))
    state[2 * PAGE] = 1
    for page in range(1, 8, 2):
        state[page * PAGE : (page + 1) * PAGE] = bytes([page + 1]) * PAGE

    def fill(content):
        for page in range(1, 8, 2):
            memory[page * PAGE : (page + 1) * PAGE] = content[page * PAGE : (page + 1) * PAGE]

    save(buffers, tmp_path / "image", lambda: fill(state), lambda: fill(b"\xff" * len(memory)))
    for i in range(4):
        assert saved(tmp_path / "image", f"b{i}") == state[cuts[i] : cuts[i + 1]]


def test_many_small_buffers(tmp_path):
    chance = random.Random(5)
    memory = anonymous(2 * MIB)
    cuts = [0, *sorted(chance.sample(range(1, len(memory)), 250)), len(memory)]
    view = memoryview(memory)
    buffers = {str(i): view[cuts[i] : cuts[i + 1]] for i in range(len(cuts) - 1) if i % 9}
    state = []

    def write(value):
        for _ in range(300):
            at = chance.randrange(len(memory))
            memory[at] = value

    def between():
        write(2)
        state.append(memory[:])

    write(1)
    result = save(buffers, tmp_path / "image", between, lambda: write(3))
    assert result.lost_pages == 0
    with open_image(tmp_path / "image") as image:
        for region in image.regions:
            i = int(region.name)
            assert image.read(region, 0, region.length) == state[0][cuts[i] : cuts[i + 1]]


@pytest.mark.parametrize("advice", [mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE])
def test_whole_units_that_are_discarded_are_holes(tmp_path, advice):
    """With a huge page, or 2 MiB of small ones (Linux 6.14), the page table is freed too."""
    memory = anonymous(12 * MIB)
    memory.madvise(advice)
    memory[:] = b"\1" * len(memory)
    offset = -address(memory) % UNIT
    expected = bytearray(memory)
    expected[offset : offset + 3 * UNIT] = bytes(3 * UNIT)
    expected[offset + UNIT + 5 * PAGE] = 2

    def between():
        memory.madvise(mmap.MADV_DONTNEED, offset, 3 * UNIT)
        memory[offset + UNIT + 5 * PAGE] = 2

    def after():
        memory[offset : offset + 2 * UNIT] = b"\3" * 2 * UNIT

    result = save(memory, tmp_path / "image", between, after)
    assert saved(tmp_path / "image") == expected
    assert (result.lost_pages, result.hole_pages) == (0, 3 * 512 - 1)


@pytest.mark.parametrize("step", [2, 72])
def test_more_holes_than_one_answer_of_the_scan_holds(tmp_path, step):
    """Holes close together, and so far apart that each is scanned separately."""
    pages = 37 * 1024
    memory = anonymous(pages * PAGE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    words = np.frombuffer(memory, "<u8").reshape(-1, 512)
    number = np.arange(pages, dtype="<u8")
    expected = np.where(number % step, number + 1, 0)
    for page in np.flatnonzero(expected):
        words[page, 7] = page + 1
    filled, gone, refilled = slice(0, None, step * 7), slice(1, None, step * 11), slice(1, None, step * 33)

    def between():
        words[filled, 7] = number[filled] + 1
        for page in number[gone]:
            memory.madvise(mmap.MADV_DONTNEED, int(page) * PAGE, PAGE)
        words[refilled, 7] = 5

    expected[filled] = number[filled] + 1
    expected[gone] = 0
    expected[refilled] = 5
    result = save(memory, tmp_path / "image", between, lambda: words[::97, 7].fill(9))
    image = np.frombuffer(saved(tmp_path / "image"), "<u8").reshape(-1, 512)
    assert np.array_equal(image[:, 7], expected)
    assert not image[:, :7].any()
    assert (result.lost_pages, result.hole_pages) == (0, np.count_nonzero(expected == 0))


def test_a_child_that_has_mapped_other_memory_there(tmp_path):
    """The other pages that were written to before T are protected again in the child too."""
    memory = anonymous(8 * MIB, SHARED)
    memory[:] = b"\1" * len(memory)
    addr = address(memory)
    (go, may_go), (ready, is_ready) = os.pipe(), os.pipe()
    children = []

    def write(value):
        for page in range(64, 80):
            memory[page * PAGE] = value

    def between():
        child = os.fork()
        if child == 0:
            write(2)
            LIBC.mmap(addr + 66 * PAGE, PAGE, 3, PRIVATE | FIXED, -1, 0)
            os.write(is_ready, b"x")
            os.read(go, 1)
            write(9)
            os._exit(0)
        children.append(child)
        os.read(ready, 1)

    def after():
        os.write(may_go, b"x")
        assert os.waitpid(children[0], 0)[1] == 0

    save(memory, tmp_path / "image", between, after)
    image = saved(tmp_path / "image")
    assert [image[page * PAGE] for page in range(64, 80)] == [2] * 16
    assert (memory[66 * PAGE], memory[67 * PAGE]) == (2, 9)


def kinds(image, target, first, count):
    """(kind, pages) of the runs in the target's memory."""
    start = target.words[MEMORY]
    region = next(r for r in image.regions if r.addr <= start < r.addr + r.length)
    runs = image.resolve(region, start - region.addr + first * PAGE, count * PAGE)
    return [(kind, n) for _, n, kind in runs]


def attached(target, path, between):
    chosen = Between(target.pid, between, regions=target.region)
    with snapengine.snapshot(chosen, path, arming="two-step") as capture:
        pass
    target.check_running()
    return capture.result


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("deed", [MAP_A_FILE, UNMAP])
def test_a_part_of_a_page_table_that_is_replaced_is_lost(tmp_path, deed):
    """It must never be zeros: a file that was not read yet is mapped there, or nothing."""
    with Victim("anon") as target:
        attached(target, tmp_path / "image", lambda: target.act(deed, FIRST + 3, 5))
        with open_image(tmp_path / "image") as image:
            assert kinds(image, target, FIRST, 16) == [(DATA, 3), (LOST, 5), (DATA, 8)]


@pytest.mark.usefixtures("programs")
def test_holes_between_what_is_hit_stay_holes(tmp_path):
    with Victim("memfd") as target:
        target.act(REMOVE, FIRST, 512)
        result = attached(target, tmp_path / "image", lambda: target.act(TOUCH, FIRST, 512))
        assert result.lost_pages == 0
        with open_image(tmp_path / "image") as image:
            assert kinds(image, target, FIRST, 512) == [(DATA, 1), (HOLE, 7)] * 64


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("kind", ["memfd", pytest.param("hugetlb", marks=pytest.mark.host_optional)])
def test_what_is_punched_out_between_the_steps_is_a_hole(request, tmp_path, kind):
    if kind == "hugetlb":
        request.getfixturevalue("hugetlb")(N_PAGES // 512 + 2)
    with Victim(kind) as target:
        result = attached(target, tmp_path / "image", lambda: target.act(REMOVE))
        assert result.lost_pages == 0
        with open_image(tmp_path / "image") as image:
            assert kinds(image, target, FIRST - 512, 2048) == [(DATA, 512), (HOLE, 1024), (DATA, 512)]


@pytest.mark.parametrize("features", [[], ["WP_UNPOPULATED"]])
def test_a_peer_that_writes_between_the_steps(tmp_path, features):
    with peer(tmp_path / "socket", features=["PAGEFAULT_FLAG_WP", *features]) as process:
        addr = []

        def between():
            process.stdin.write("\n")
            process.stdin.flush()
            addr.append(int(process.stdout.readline()))
            assert process.stdout.readline() == "written\n"

        target = PeerBetween(tmp_path / "socket", between)
        with snapengine.snapshot(target, tmp_path / "image", arming="two-step") as capture:
            pass
    assert (capture.result.lost_pages, capture.result.hole_pages) == (0, 0)
    with open_image(tmp_path / "image") as image:
        content = image.read_at(addr[0], 8 * MIB)
    assert all(content[page : page + 8] == b"ffffffff" for page in range(0, len(content), PAGE))


ENGINE = """
import sys, time
sys.path.insert(0, sys.argv[3])
import snapengine
from test_between_steps import Between
def between():
    print("between", flush=True)
    time.sleep(100)
with snapengine.snapshot(Between(int(sys.argv[1]), between), sys.argv[2], arming="two-step"):
    pass
"""


@pytest.mark.usefixtures("programs")
def test_an_engine_that_is_killed_between_the_steps(tmp_path):
    with OrderTarget("anon", 2, 40503) as target:
        command = [sys.executable, "-c", ENGINE, str(target.pid), tmp_path / "image", SOURCES.parent]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as engine:
            assert engine.stdout.readline() == "between\n"
            target.check_running(2)
            engine.send_signal(signal.SIGKILL)
        target.check_running(2)
        with snapengine.snapshot(ProcessTarget(target.pid), tmp_path / "image", arming="two-step"):
            pass
        target.check_running(2)


@pytest.mark.usefixtures("programs")
def test_a_target_that_is_killed_between_the_steps(tmp_path):
    with OrderTarget("memfd", 2, 40503) as target:
        chosen = Between(target.pid, target.process.kill)
        capture = snapengine.snapshot(chosen, tmp_path / "image", arming="two-step")
        with pytest.raises(TargetGoneError), capture:
            pass
    assert not list(tmp_path.iterdir())
