"""How long a write waits for the engine, measured by the writer, alternated with the floor.

The floor is a minimal fault loop with one blocked handler per CPU.
"""

import time

import pytest
from benchkit import MIB, ROUNDS, Samples, protected, size, small_pages
from floorkit import fault_ns, spread_ns
from writerkit import add_up, after_arming, agreement, spread, stall_quantiles, stalls_between

import snapengine
from snapengine.base.histogram import bucket_floor, bucket_number
from snapengine.guest.params import GuestParams
from snapengine.handover.peer import PeerTarget
from snapengine.options import Options

SIZE = size("STALL_SIZE", "256M")
LARGE = size("STALL_LARGE_SIZE", "1G")
FLOOR_SIZE = 16 * MIB
LIMIT = 64 * MIB
SINK_RATE = 50 * MIB
FLOORS = {f"stall_{name}_ns": f"floor_{name}_ns" for name in ("p50", "p99", "longest")}

pytestmark = [pytest.mark.timeout(300), pytest.mark.benchmark(group="stalls")]


@pytest.fixture(scope="module")
def fault_memory(floors):
    """The memory of the floor's writer, populated."""
    memory = small_pages(min(SIZE, FLOOR_SIZE))
    floors.fill(memory)
    return memory


def floor(floors, memory):
    """Nanoseconds of each write of the floor."""
    with protected(floors, memory, sync=True) as tracked:
        return fault_ns(floors, tracked, (0, 1))


def by_buckets(values):
    """A histogram of single times, with the buckets of a guest's histogram."""
    histogram = {}
    for value in values:
        add_up(histogram, {bucket_floor(bucket_number(value)): 1})
    return histogram


def wait_saved(capture):
    """Wait until the last page is saved."""
    while (progress := capture.progress()).pages_done < progress.pages_total:
        if progress.phase == "done":
            break
        time.sleep(0.001)


def save(guest, socket, rate_limit):
    """One capture, and the guest's stalls from its start until the last page was saved."""
    options = Options(memory_limit=LIMIT, rate_limit=rate_limit)
    before = guest.stats()
    with snapengine.snapshot(PeerTarget(socket), "null:", options) as capture:
        wait_saved(capture)
        after = guest.stats()
    return stall_quantiles(before, after), capture.result


def bench_stalls(benchmark, floors, fault_memory, start_guest):
    """A throttled sink against one without limit."""
    guest, socket = start_guest(GuestParams(size=SIZE), None)
    samples = Samples()

    def alternate():
        samples.note(**spread_ns("floor", floor(floors, fault_memory)))
        p99 = {}
        for name, rate in (("free", 0), ("throttled", SINK_RATE)):
            stalls, result = save(guest, socket, rate)
            p99[name] = stalls["p99_ns"]
            samples.note(**{f"{name}_{key}": value for key, value in stalls.items()})
            samples.note(**{f"{name}_engine_p99_ns": result.fault_ns["p99"]})
        samples.note(throttled_p99_ratio=p99["throttled"] / max(p99["free"], 1))
        samples.note(spilled_bytes=result.spilled_bytes)

    save(guest, socket, 0)
    benchmark.pedantic(alternate, rounds=ROUNDS)
    benchmark.extra_info.update(size=SIZE, sink_rate=SINK_RATE, memory_limit=LIMIT, samples=samples)


@pytest.mark.parametrize("length", [SIZE, LARGE], ids=["small", "large"])
def bench_writer_stalls(benchmark, floors, fault_memory, start_guest, length):
    """Stalls between T and the last page, without those that began in arming, by writer and engine."""
    guest, socket = start_guest(GuestParams(size=length, incompressible=True), None)
    samples, histograms = Samples(), {"ours": {}, "floor": {}, "engine": {}}
    benchmark.extra_info.update(size=length, memory_limit=LIMIT, samples=samples, floors=FLOORS)

    def capture():
        with snapengine.snapshot(PeerTarget(socket), "null:", Options(memory_limit=LIMIT)) as running:
            at_t = time.monotonic_ns()
            began = after_arming(guest.stats)
            wait_saved(running)
            saved_ns, ended = time.monotonic_ns() - at_t, guest.stats()
        after = guest.stats()
        return began, ended, after, saved_ns, running.result

    def alternate():
        bare = floor(floors, fault_memory)
        began, ended, after, saved_ns, result = capture()
        stalls = stalls_between(began, ended)
        samples.note(**spread_ns("floor", bare), walk_rate=length * 1e9 / saved_ns)
        samples.note(**{f"stall_{key}": value for key, value in spread(stalls).items()})
        samples.note(arm_ns=result.arm_ns, faults=result.faults, engine_p99_ns=result.fault_ns["p99"])
        samples.note(**agreement(stalls_between(began, after), result.fault_histogram))
        add_up(histograms["ours"], stalls)
        add_up(histograms["floor"], by_buckets(bare))
        add_up(histograms["engine"], dict(result.fault_histogram))

    capture()
    benchmark.pedantic(alternate, rounds=ROUNDS)
    benchmark.extra_info["histograms"] = {name: sorted(counts.items()) for name, counts in histograms.items()}
