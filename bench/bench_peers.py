"""`make bench-peers`: our engine against loops of other engines' shapes and against fork, alternated.

Not a part of `make bench` (see conftest.py). All of them save the same memory of this process, while a native
thread writes to it at full speed in random order and times its own writes.
"""

import os
import threading
import time

import floorkit
import pytest
from benchkit import ROUNDS, TMPFS, is_tmpfs, size, warm_file
from peers import shapes
from writerkit import lost_work_ms, spread, stalls_between, written

import snapengine
from snapengine.guest.memory import GuestMemory
from snapengine.guest.params import GuestParams
from snapengine.guest.writers import GuestWriters
from snapengine.options import MIB, Options

SIZE = size("PEER_SIZE", "1G")
LIMIT = 64 * MIB
BEFORE_S = 0.5
TAIL_S = 0.3

pytestmark = [pytest.mark.timeout(480), pytest.mark.benchmark(group="peers")]


def save_ours(memory, path, at_t):
    """One capture by our engine; calls `at_t` at T."""
    options = Options(memory_limit=LIMIT, spill_dir=str(TMPFS))
    with snapengine.snapshot(memory, path or "null:", options) as capture:
        at_t()
    assert capture.result.lost_pages == 0
    return {"image_bytes": capture.result.image_bytes, "faults": capture.result.faults}


@pytest.fixture(scope="module")
def ways(native):
    """The compared ways by name, ours first."""
    return {"ours": save_ours} | shapes.ways(floorkit.load_loops())


@pytest.fixture(scope="module")
def busy():
    """(Memory in 4 KiB pages, its writer, which runs at full speed)."""
    params = GuestParams(size=SIZE, incompressible=True)
    with GuestMemory(params) as memory, GuestWriters(memory) as writers:
        writers.resume()
        yield memory, writers


def spread_between(before, after):
    """Count, p50, p99 and longest of the stalls between two readings of the writer's `stalls`."""
    return spread(stalls_between({"stalls": before}, {"stalls": after}))


class AfterT:
    """Reads the writer's `stalls` after the write that was blocked at T (or by fork) has completed."""

    def __init__(self, writers):
        self._writers = writers
        self._thread = threading.Thread(target=self._wait)
        self.stalls = None

    def __call__(self):
        """Call at T. Does not block: for some ways the calling thread has to serve that write."""
        self._at_t = self._writers.counts()
        self._thread.start()

    def _wait(self):
        while self._writers.counts() == self._at_t:
            time.sleep(0.0005)
        self.stalls = self._writers.stalls()

    def join(self):
        """Wait until `stalls` is there."""
        self._thread.join()


def measure(way, memory, writers, path):
    """One save, and its effect on the writer; lost work is counted until TAIL_S after the end."""
    watched, calm = time.monotonic_ns(), writers.stalls()
    time.sleep(BEFORE_S)
    began, before = time.monotonic_ns(), writers.stalls()
    rate = written(writers.bins(watched), began) / (began - watched) * 1e9
    after_t = AfterT(writers)
    saved = way(memory, path, after_t)
    ended = time.monotonic_ns()
    after_t.join()  # on a loaded machine its thread reads the stalls later than the save ends
    after = writers.stalls()
    time.sleep(TAIL_S)
    until = time.monotonic_ns()
    stalls = spread_between(before, after)
    return saved | {
        "total_ns": ended - began,
        "stalls": stalls["stalls"],
        "stall_p50_ns": stalls["p50_ns"],
        "stall_p99_ns": stalls["p99_ns"],
        "stall_longest_ns": stalls["longest_ns"],
        "stall_longest_after_t_ns": spread_between(after_t.stalls, after)["longest_ns"],
        "stall_longest_before_ns": spread_between(calm, before)["longest_ns"],
        "lost_ns": lost_work_ms(writers.bins(began), began, until, rate) * 1e6,
        "writes_before_per_s": rate,
    }


def compared(runs):
    """Ours against the peers, round by round."""
    rounds = list(zip(runs["ours"], runs["qemu-shape"], runs["forkd-shape"], strict=True))
    return {
        "qemu_shape_rate_ratio": [qemu["total_ns"] / ours["total_ns"] for ours, qemu, _ in rounds],
        "qemu_shape_p99_ratio": [
            ours["stall_p99_ns"] / max(qemu["stall_p99_ns"], 1) for ours, qemu, _ in rounds
        ],
        "forkd_shape_longest_ratio": [
            ours["stall_longest_ns"] / max(forkd["stall_longest_ns"], 1) for ours, _, forkd in rounds
        ],
        "forkd_shape_longest_after_t_ratio": [
            ours["stall_longest_after_t_ns"] / max(forkd["stall_longest_ns"], 1) for ours, _, forkd in rounds
        ],
    }


@pytest.mark.parametrize("sink", ["tmpfs", "null"])
def bench_peers(benchmark, ways, busy, tmp_path, sink):
    if sink == "tmpfs" and not is_tmpfs(TMPFS):
        pytest.skip(f"{TMPFS} is not a tmpfs: set SNAPENGINE_BENCH_TMPFS")
    path = TMPFS / f"snapengine-bench-{tmp_path.name}" if sink == "tmpfs" else None
    runs = {way: [] for way in ways}
    benchmark.extra_info.update(size=SIZE, sink=sink, runs=runs, load=os.getloadavg()[0])

    def alternate():
        for name, way in ways.items():
            if path:
                path.unlink(missing_ok=True)
                warm_file(path, SIZE + SIZE // 64)
            runs[name].append(measure(way, *busy, path))

    try:
        alternate()
        for values in runs.values():
            values.clear()
        benchmark.pedantic(alternate, rounds=ROUNDS)
        benchmark.extra_info["samples"] = compared(runs)
    finally:
        if path:
            path.unlink(missing_ok=True)
