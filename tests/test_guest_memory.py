"""Guest memory and its native writers."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import subprocess
import sys
import time

import hugekit
import pytest
from hugekit import huge_pages
from waitkit import PATIENCE_S, attempts, until

from snapengine.base.histogram import bucket_floor
from snapengine.base.histogram import bucket_number as bucket_of
from snapengine.guest.check import check_cut
from snapengine.guest.memory import GuestMemory
from snapengine.guest.params import HUGE_BYTES, PAGE_BYTES, GuestParams
from snapengine.guest.pattern import class_of
from snapengine.guest.writers import GuestWriters

MIB = 1 << 20
PARAMS = GuestParams(size=MIB, threads=3, zero_percent=30, hole_percent=20)


@pytest.mark.parametrize("backing", ["anon", "memfd"])
@pytest.mark.parametrize("pages", ["4k", "thp", "2m"])
@pytest.mark.parametrize("pattern", ["uniform", "hot", "sequential"])
def test_native_writers_keep_the_order(backing: str, pages: str, pattern: str) -> None:
    size = 8 * MIB
    params = GuestParams(
        size=size, backing=backing, pages=pages, threads=4, pattern=pattern, hot_size=MIB,
        zero_percent=25, hole_percent=25, seed=99,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        if pages == "2m":
            stack.enter_context(huge_pages(size // HUGE_BYTES))
        memory = stack.enter_context(GuestMemory(params))
        assert memory.addr % HUGE_BYTES == 0
        writers = stack.enter_context(GuestWriters(memory))
        assert check_cut(memory, params, [0] * 4).consistent
        writers.resume()
        for floor in (1000, 20000):
            until(lambda floor=floor: min(writers.counts()) > floor)
            writers.pause(PATIENCE_S)
            counts = writers.counts()
            report = check_cut(memory, params, counts)
            assert report.consistent, report.violation
            assert writers.counts() == counts
            writers.resume()


def test_copy_under_the_writers_is_caught() -> None:
    """The oracle also fails on real memory: a plain copy while the writers run is not a consistent cut."""
    params = GuestParams(size=16 * MIB, threads=2)
    with GuestMemory(params) as memory, GuestWriters(memory) as writers:
        writers.resume()
        until(lambda: min(writers.counts()) > 1000)
        half = params.size // 2
        copy = bytearray(memory)
        before = sum(writers.counts())
        until(lambda: sum(writers.counts()) > before + 10000)
        copy[half:] = memoryview(memory)[half:]
        assert not check_cut(copy, params).consistent


def test_holes_are_not_touched() -> None:
    params = GuestParams(size=64 * MIB, hole_percent=50, zero_percent=10)
    holes = [page for page in range(params.page_count) if class_of(params, page) == "hole"]
    assert len(holes) == pytest.approx(params.page_count / 2, rel=0.02)
    with GuestMemory(params) as memory, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(memory.addr // PAGE_BYTES * 8)
        entries = struct.unpack(f"<{params.page_count}Q", pagemap.read(params.page_count * 8))
    present = {page for page, entry in enumerate(entries) if entry >> 62}
    assert present == set(range(params.page_count)) - set(holes)
    kinds = [class_of(params, page) for page in range(params.page_count)]
    assert kinds.count("zero") == pytest.approx(params.page_count / 10, rel=0.25)


def test_thp_holes_are_whole_huge_pages() -> None:
    params = GuestParams(size=64 * MIB, hole_percent=25, pages="thp")
    units = [{class_of(params, unit * 512 + page) for page in range(512)} for unit in range(32)]
    assert sum(kinds == {"hole"} for kinds in units) == 8
    assert all(kinds == {"hole"} or "hole" not in kinds for kinds in units)


def test_compressibility() -> None:
    zstandard = pytest.importorskip("zstandard")
    for incompressible, low, high in ((False, 3.0, 5.0), (True, 0.99, 1.01)):
        params = GuestParams(size=4 * MIB, incompressible=incompressible)
        with GuestMemory(params) as memory:
            data = bytes(memory)
        ratio = len(data) / len(zstandard.ZstdCompressor(level=1).compress(data))
        assert low < ratio < high


def test_writers_write_holes_and_zero_pages() -> None:
    params = GuestParams(size=MIB, hole_percent=50, zero_percent=50, pattern="sequential")
    with GuestMemory(params) as memory, GuestWriters(memory) as writers:
        writers.resume()
        until(lambda: writers.counts()[0] > params.page_count)
        writers.pause(PATIENCE_S)
        report = check_cut(memory, params, writers.counts())
        assert report.consistent, report.violation
        assert report.written_pages == params.page_count
        assert report.untouched_hole_pages == 0


def test_throttle() -> None:
    """The rate is never exceeded, and is reached if the writers get a CPU."""
    params = GuestParams(size=MIB, threads=2)
    for _ in attempts("the writers are too slow"):
        with GuestMemory(params) as memory, GuestWriters(memory, 20000) as writers:
            begin = time.monotonic()
            writers.resume()
            until(lambda writers=writers: sum(writers.counts()) >= 6000)
            taken = time.monotonic() - begin
        assert taken > 0.3 * 0.75
        if taken < 0.3 * 1.25:
            break


def test_rate_zero_never_writes_and_pauses_at_once() -> None:
    params = GuestParams(size=MIB, threads=8)
    with GuestMemory(params) as memory, GuestWriters(memory, 0) as writers:
        writers.resume()
        writers.pause(PATIENCE_S)
        assert writers.counts() == [0] * 8
        assert check_cut(memory, params, [0] * 8).consistent


def test_pause_and_resume_many_times() -> None:
    """A lost wake-up would hang this test; a writer that runs while paused would change the counts."""
    params = GuestParams(size=MIB, threads=8)
    with GuestMemory(params) as memory, GuestWriters(memory) as writers:
        for _ in range(300):
            writers.resume()
            writers.pause(PATIENCE_S)
            counts = writers.counts()
            writers.pause(PATIENCE_S)
            assert writers.counts() == counts
        report = check_cut(memory, params, counts)
        assert report.consistent, report.violation


def test_bins_and_stalls_add_up() -> None:
    params = GuestParams(size=4 * MIB, threads=2)
    with GuestMemory(params) as memory, GuestWriters(memory) as writers:
        begin = time.monotonic_ns()
        writers.resume()
        until(lambda: len(writers.bins()) > 5)
        writers.pause(PATIENCE_S)
        end = time.monotonic_ns()
        bins, stalls, total = writers.bins(), writers.stalls(), sum(writers.counts())
        assert sum(count for _, count in bins) == total
        assert all(at % 10_000_000 == 0 and begin - 10_000_000 < at <= end for at, _ in bins)
        assert [at for at, _ in bins] == sorted({at for at, _ in bins})
        assert writers.bins(end + 1) == []
        assert sum(count for _, count in stalls["histogram"]) == stalls["count"] < total
        assert all(least >= 3000 * 7 // 8 for least, _ in stalls["histogram"])
        if stalls["count"]:
            assert bucket_of(stalls["max_ns"]) == bucket_of(stalls["histogram"][-1][0])


def test_histogram_buckets() -> None:
    for ns in [*range(5000), 10**6, 10**9, 10**12, 2**64 - 1]:
        bucket = bucket_of(ns)
        assert bucket < 496
        assert bucket_floor(bucket) <= ns
        assert ns < 8 or ns * 8 < bucket_floor(bucket) * 9
        assert bucket_of(bucket_floor(bucket)) == bucket


def test_life_cycle() -> None:
    params = GuestParams(size=MIB)
    memory = GuestMemory(params)
    writers = GuestWriters(memory)
    with pytest.raises(BufferError):
        memory.close()
    writers.close()
    writers.close()
    with pytest.raises(ValueError, match="closed"):
        writers.counts()
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        memoryview(memory)


FORGOTTEN = """
import gc
from snapengine.guest.memory import GuestMemory
from snapengine.guest.params import GuestParams
from snapengine.guest.writers import GuestWriters
memory = GuestMemory(GuestParams(size=1 << 20))
writers = GuestWriters(memory)
writers.resume()
while not writers.counts()[0]:
    pass
del writers
gc.collect()
before = bytes(memory)
while bytes(memory) == before:
    pass
try:
    memory.close()
except BufferError:
    print("in use")
del memory
gc.collect()
"""


def test_forgotten_writers_do_not_crash() -> None:
    """They are never stopped; their memory stays mapped as long as they write to it."""
    run = subprocess.run(
        [sys.executable, "-c", FORGOTTEN], capture_output=True, text=True, timeout=PATIENCE_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "in use\n", "")


def test_writers_that_do_not_start_let_go_of_the_memory() -> None:
    with GuestMemory(GuestParams(size=MIB)) as memory:
        for rate in (-1, 1.5, True):
            with pytest.raises(ValueError, match="rate"):
                GuestWriters(memory, rate)  # type: ignore[arg-type]


def test_huge_pages_that_are_not_there() -> None:
    with huge_pages(0):
        params = GuestParams(size=(int(hugekit.KNOB.read_text()) + 8) * HUGE_BYTES, pages="2m")
        with pytest.raises(OSError, match="nr_hugepages"):
            GuestMemory(params)


def test_memfd_cannot_be_shrunk() -> None:
    with GuestMemory(GuestParams(size=MIB, backing="memfd")) as memory:
        with pytest.raises(PermissionError):
            mmap.mmap(memory.memfd, MIB).resize(PAGE_BYTES)
        assert bytes(memory) == mmap.mmap(memory.memfd, MIB)[:]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0), ("size", 4097), ("size", -4096), ("size", 2.0), ("size", True), ("threads", 0),
        ("threads", 9), ("pattern", "x"), ("pages", "1g"), ("backing", "file"), ("zero_percent", -1),
        ("zero_percent", 101), ("hole_percent", 71), ("seed", -1), ("seed", 1 << 63), ("incompressible", 1),
    ],
)  # fmt: skip
def test_bad_parameters(field: str, value: object) -> None:
    good: dict[str, object] = {"size": MIB, "zero_percent": 30, "threads": 2}
    with pytest.raises(ValueError, match=field):
        GuestParams(**{**good, field: value})  # type: ignore[arg-type]


def test_parameters_go_through_json() -> None:
    assert GuestParams.from_json(PARAMS.to_json()) == PARAMS
    with pytest.raises(ValueError, match="guest parameters"):
        GuestParams.from_json({"size": MIB, "colour": 1})
