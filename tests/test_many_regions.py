"""The cost of thousands of mappings, regions and buffers is linear: there is no search per item.

The tests compare CPU times, the least of several runs: four times as many regions are four times the work.
"""

import mmap
import time

import pytest
from targetkit import COUNTERS, MEMORY, Target, until

import snapengine
from snapengine.capture.region_plan import Plan
from snapengine.engine.session import Session
from snapengine.image import open_image
from snapengine.kernel.procmaps import Mapping, covering, read_maps
from snapengine.kernel.uffd import FEATURES
from snapengine.process.target import ProcessTarget, appeared
from snapengine.regions import Region
from snapengine.targets import buffer as targets
from snapengine.targets.buffer import BufferTarget

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

PAGE, MIB = 4096, 1 << 20
START = 0x7000_0000_0000
ALL = sum(bit for name, bit in FEATURES.items() if name not in ("WP_UNPOPULATED", "WP_ASYNC"))
NOBODY = 1 << 22  # no process has this pid (PID_MAX_LIMIT of Linux)


def mappings_of(n, kind):
    perms, device, inode, path = {
        "anon": ("rw-p", "00:00", 0, ""),
        "memfd": ("rw-s", "00:01", 7, "/memfd:x (deleted)"),
    }[kind]
    return [
        Mapping(START + i * 2 * PAGE, START + (2 * i + 1) * PAGE, perms, i * PAGE, device, inode, path)
        for i in range(n)
    ]


def regions_of(mappings, kind):
    kind = {"anon": "anon", "memfd": "shared"}[kind]
    return [Region(f"r{m.start:x}", m.start, m.end - m.start, PAGE, kind) for m in mappings]


def cpu(work):
    times = []
    for _ in range(3):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return min(times)


def check_linear(work, n=1500):
    """`work(n)` returns the measured function; it may take at most 8 times as long for 4 times as many."""
    assert cpu(work(4 * n)) < 8 * cpu(work(n)) + 0.02


@pytest.mark.parametrize("kind", ["anon", "memfd"])
def test_a_plan_of_many_regions(kind):
    def work(n):
        mappings = mappings_of(n, kind)
        regions = regions_of(mappings, kind)
        return lambda: Plan(regions, NOBODY, ALL, attached=True, mappings=mappings).close()

    check_linear(work)


def test_what_a_region_lies_in_is_found_without_a_search():
    def work(n):
        mappings = mappings_of(n, "anon")
        return lambda: [covering(mappings, m.start, m.end) for m in mappings]

    check_linear(work)


def test_what_has_appeared():
    def work(n):
        mappings = mappings_of(n, "anon")
        known = [(m.start, m.end) for m in mappings[::2]]
        return lambda: appeared(mappings, known)

    check_linear(work)


def test_a_session_of_many_regions():
    def work(n):
        mappings = mappings_of(n, "anon")
        plan = Plan(regions_of(mappings, "anon"), 0, ALL, mappings=mappings)

        def make():
            Session(plan.regions, -1, ALL, memory_limit=64 * MIB, fault_threads=1, encoders=1).close()

        return make

    check_linear(work)


def test_neighbours_are_found():
    """The flags that say whether a mapping may have grown since it was listed."""
    starts = [START, START + PAGE, START + 3 * PAGE]
    mappings = [Mapping(start, start + PAGE, "rw-p", 0, "00:00", 0, "") for start in starts]
    plan = Plan(regions_of(mappings, "anon"), 0, ALL, mappings=mappings)
    assert [(item.alone_before, item.alone_after) for item in plan.regions] == [
        (False, True), (True, False), (False, False)
    ]  # fmt: skip


def test_one_descriptor_for_a_file_that_is_mapped_often():
    with mmap.mmap(-1, 64 * PAGE) as memory:  # shared
        addr = read_addr(memory)
        regions = [Region(f"r{at}", addr + at * PAGE, PAGE, PAGE, "shared") for at in range(0, 64, 2)]
        plan = Plan(regions, 0, ALL)
        files = {item.file for item in plan.regions}
        offsets = [item.file_offset for item in plan.regions]
        plan.close()
    assert len(files) == 1
    assert [offset - offsets[0] for offset in offsets] == [at * PAGE for at in range(0, 64, 2)]


def read_addr(memory):
    held = BufferTarget(memory)
    _, _, (region,) = held.open(0)
    held.close("completed")
    return region.addr


def test_the_maps_are_read_once_for_all_buffers(monkeypatch):
    reads = []
    monkeypatch.setattr(targets, "read_maps", lambda *args: reads.append(args) or read_maps(*args))
    target = BufferTarget({f"b{i}": bytearray(5000) for i in range(200)})
    assert len(target.open(0)[2]) == 200
    target.close("completed")
    assert len(reads) == 1


def test_two_mappings_of_one_memory_among_many():
    mappings = mappings_of(50, "memfd")
    twice = Mapping(START - 4 * PAGE, START - 3 * PAGE, "rw-s", 20 * PAGE, "00:01", 7, "/memfd:x (deleted)")
    plan = Plan(regions_of(mappings, "memfd"), NOBODY, ALL, attached=True, mappings=[twice, *mappings])
    assert [text for text in plan.warnings if "second time" in text] == [
        f"region 'r{mappings[20].start:x}' is mapped a second time at {twice.start:#x}: "
        "writes there are not seen"
    ]
    plan.close()


def test_many_small_buffers_that_share_pages(tmp_path):
    """Adjacent regions, several per page, in no order; writers write to all of them."""
    n, size = 3000, 700
    with mmap.mmap(-1, n * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for i in range(n):
            memory[i * size : (i + 1) * size] = bytes([i % 251 + 1]) * size
        expected = bytes(memory)
        view = memoryview(memory)
        order = [i * 1009 % n for i in range(n)]
        buffers = {f"b{i}": view[i * size : (i + 1) * size] for i in order}
        for arming in ("plain", "two-step"):
            with snapengine.snapshot(buffers, tmp_path / arming, arming=arming):
                for i in range(0, n, 3):
                    memory[i * size] = 255
            with open_image(tmp_path / arming) as image:
                assert b"".join(image.read(f"b{i}", 0, size) for i in range(n)) == expected
            memory[:] = expected
        buffers.clear()
        view.release()


@pytest.mark.parametrize("cut", ["soft", "stop"])
@pytest.mark.parametrize("kind", ["private", "memfd"])
def test_a_process_with_many_mappings(tmp_path, kind, cut):
    spent = {}
    for n in (2000, 8000):
        with Target("reserve", "many", kind, n) as target:
            began = time.process_time()
            with snapengine.snapshot(ProcessTarget(target.pid, cut=cut), tmp_path / "image") as capture:
                pass
            spent[n] = time.process_time() - began
            memory = target.words[MEMORY]
            with open_image(tmp_path / "image") as image:
                image.verify()
                for i in (*range(1, n, n // 20), n - 1):
                    assert int.from_bytes(image.read_at(memory + i * 2 * PAGE, 8), "little") == i + 1
            before = target.words[COUNTERS]
            until(lambda: target.words[COUNTERS] > before, "it does not run any more")  # noqa: B023
        assert capture.result.lost_pages == 0
    assert spent[8000] < 8 * spent[2000]
