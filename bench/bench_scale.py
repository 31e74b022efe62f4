"""Idle capture into the null sink against memcpy, over the size of the memory.

memcpy copies every part into the same buffer, so that only the source is large.
"""

import time

import pytest
from benchkit import GIB, MIB, ROUNDS, Samples, huge_pages, size, small_pages

import snapengine

LARGEST = size("SCALE_SIZE", "8G")
SIZES = [256 * MIB << power for power in range(16) if 256 * MIB << power <= LARGEST]
WINDOW = 256 * MIB
HEADROOM = 2 * GIB
FLOORS = {"capture_largest_ns": "memcpy_largest_ns"}


@pytest.fixture
def source(floors):
    """The source, populated, in 4 KiB pages."""
    if needed_bytes() > available_bytes():
        pytest.skip(f"less than {needed_bytes() >> 30} GiB available: set SNAPENGINE_BENCH_SCALE_SIZE")
    with small_pages(SIZES[-1]) as memory:
        floors.fill(memory)
        yield memory


def needed_bytes():
    """Memory that the largest size needs."""
    return SIZES[-1] + WINDOW + HEADROOM


def available_bytes():
    """MemAvailable."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def memcpy_ns(floors, window, view):
    """memcpy of all of `view`, part by part into `window`."""
    parts = (view[at : at + len(window)] for at in range(0, len(view), len(window)))
    return sum(floors.copy_ns(window, part) for part in parts)


def capture_ns(view):
    """One capture into the null sink."""
    began = time.monotonic_ns()
    with snapengine.snapshot(snapengine.BufferTarget(view), "null:") as capture:
        pass
    taken = time.monotonic_ns() - began
    assert capture.result.pages_saved == len(view) // 4096
    return taken


@pytest.mark.timeout(400)
@pytest.mark.benchmark(group="scale")
def bench_sizes(benchmark, floors, source):
    window = huge_pages(WINDOW)
    floors.fill(window, 1)
    by_size = {length: {"capture_ns": [], "memcpy_ns": []} for length in SIZES}
    samples = Samples()
    benchmark.extra_info.update(size=SIZES[-1], samples=samples, floors=FLOORS)

    def alternate():
        with memoryview(source) as view:
            for length, taken in by_size.items():
                with view[:length] as part:
                    taken["memcpy_ns"].append(memcpy_ns(floors, window, part))
                    taken["capture_ns"].append(capture_ns(part))

    alternate()
    for taken in by_size.values():
        taken["capture_ns"].clear()
        taken["memcpy_ns"].clear()
    benchmark.pedantic(alternate, rounds=ROUNDS)
    benchmark.extra_info["by_size"] = by_size
    if GIB in by_size and SIZES[-1] > GIB:
        for name in ("capture_ns", "memcpy_ns"):
            pairs = list(zip(by_size[SIZES[-1]][name], by_size[GIB][name], strict=True))
            word = name.removesuffix("_ns")
            samples[f"{word}_largest_ns"] = [large for large, _ in pairs]
            samples[f"{word}_per_gib_ratio"] = [large * GIB / SIZES[-1] / one for large, one in pairs]
