"""How long a write waits for the engine: throttled sink, free sink, and the floor, in alternation."""

import time

import pytest
from benchkit import Samples, fault_floor, size, small_pages, stall_quantiles

import snapengine
from snapengine.guestparams import GuestParams
from snapengine.options import MIB, Options
from snapengine.peer import PeerTarget

SIZE = size("STALL_SIZE", "256M")
PAIRS = 5
LIMIT = 64 * MIB
SINK_RATE = 50 * MIB


def save(guest, socket, rate_limit):
    """One capture and the guest's stalls from before it until its last page was saved."""
    options = Options(memory_limit=LIMIT, rate_limit=rate_limit)
    before = guest.stats()
    with snapengine.snapshot(PeerTarget(socket), "null:", options) as capture:
        while (progress := capture.progress()).pages_done < progress.pages_total:
            if progress.phase == "done":
                break
            time.sleep(0.001)
        after = guest.stats()
    return stall_quantiles(before, after), capture.result


@pytest.mark.timeout(300)
@pytest.mark.benchmark(group="stalls")
def bench_stalls(benchmark, floors, start_guest):
    guest, socket = start_guest(GuestParams(size=SIZE), None)
    memory = small_pages(min(SIZE, 64 * MIB))
    floors.fill(memory)
    samples = Samples()

    def alternate():
        samples.note(**fault_floor(floors, memory))
        p99 = {}
        for name, rate in (("free", 0), ("throttled", SINK_RATE)):
            stalls, result = save(guest, socket, rate)
            p99[name] = stalls["p99_ns"]
            samples.note(**{f"{name}_{key}": value for key, value in stalls.items()})
            samples.note(**{f"{name}_engine_p99_ns": result.fault_ns["p99"]})
        samples.note(throttled_p99_ratio=p99["throttled"] / max(p99["free"], 1))
        samples.note(spilled_bytes=result.spilled_bytes)

    save(guest, socket, 0)
    benchmark.pedantic(alternate, rounds=PAIRS)
    benchmark.extra_info.update(size=SIZE, sink_rate=SINK_RATE, memory_limit=LIMIT, samples=samples)
