"""Capture into a tmpfs: with a writer at full speed over all of the memory; zstd against no compression."""

import gc
import os
import time

import pytest
from benchkit import MIB, ROUNDS, Samples, process_status, reset_peak, size, small_pages, warm_file

import snapengine
from snapengine.guest.params import GuestParams
from snapengine.handover.peer import PeerTarget
from snapengine.options import MIN_MEMORY_LIMIT, Options

SIZE = size("COPY_SIZE", "1G")
ZSTD_SIZE = size("ZSTD_SIZE", "256M")
LIMIT = 64 * MIB

pytestmark = [pytest.mark.timeout(300), pytest.mark.benchmark(group="tmpfs")]


def resident_without_slots():
    """VmRSS with the fewest slots: a capture keeps its slots for the next one."""
    with small_pages(MIB) as memory, snapengine.snapshot(memory, "null:", memory_limit=MIN_MEMORY_LIMIT):
        pass
    gc.collect()
    return process_status("VmRSS")


def save(socket, path, samples, options, resident):
    """One capture. The engine's memory is the growth of this process beyond `resident`.

    `resident` must be from before the first capture, as each keeps its slots for the next one.
    """
    shared = process_status("RssShmem")
    reset_peak()
    began = time.monotonic_ns()
    with snapengine.snapshot(PeerTarget(socket), path, options) as capture:
        pass
    samples.note(capture_ns=time.monotonic_ns() - began)
    result = capture.result
    grown = process_status("VmHWM") - resident
    assert process_status("RssShmem") == shared
    samples.note(
        grown_bytes=grown,
        grown_over_limit_bytes=grown - options.memory_limit,
        peak_buffer_bytes=result.peak_buffer_bytes,
        spilled_bytes=result.spilled_bytes,
        image_bytes=result.image_bytes,
        faults=result.faults,
        stop_ns=result.stop_ns,
    )
    return result


def make_room(path, length):
    """Make sure that free memory is backed by the host, and that the heap has no garbage."""
    path.unlink(missing_ok=True)
    warm_file(path, length + length // 64)
    gc.collect()


@pytest.fixture(scope="module")
def source(floors):
    """Populated memory of the guest's size."""
    with small_pages(SIZE) as memory:
        floors.fill(memory)
        yield memory


def pwrite_ns(source, path):
    """The floor: one thread writes as many bytes into a new file, beside the same guest."""
    with memoryview(source) as view, open(path, "wb", buffering=0) as file:
        began = time.monotonic_ns()
        for at in range(0, len(view), MIB):
            os.pwrite(file.fileno(), view[at : at + MIB], at)
        return time.monotonic_ns() - began


@pytest.mark.parametrize("backing", ["anon", "memfd"])
def bench_full_speed_writer(benchmark, start_guest, tmpfs, source, backing):
    _, socket = start_guest(GuestParams(size=SIZE, backing=backing, incompressible=True), None)
    samples = Samples()
    options = Options(memory_limit=LIMIT, spill_dir=str(tmpfs.parent))
    floors = {"capture_ns": "pwrite_ns"}
    benchmark.extra_info.update(size=SIZE, memory_limit=LIMIT, samples=samples, floors=floors)
    make_room(tmpfs, SIZE)
    resident = resident_without_slots()
    save(socket, tmpfs, Samples(), options, resident)

    def floor():
        make_room(tmpfs, SIZE)
        samples.note(pwrite_ns=pwrite_ns(source, tmpfs))
        make_room(tmpfs, SIZE)

    benchmark.pedantic(save, args=(socket, tmpfs, samples, options, resident), setup=floor, rounds=ROUNDS)
    if backing == "memfd":  # VmHWM includes the guest's RAM, which is mapped here
        del samples["grown_bytes"], samples["grown_over_limit_bytes"]


def bench_zstd(benchmark, start_guest, tmpfs):
    """The content compresses 4:1; the guest does not write, so no chunk is stored raw."""
    _, socket = start_guest(GuestParams(size=ZSTD_SIZE), 0)
    both = {"none": Samples(), "zstd:1": Samples()}

    def pair():
        for compress, samples in both.items():
            make_room(tmpfs, ZSTD_SIZE)
            save(socket, tmpfs, samples, Options(compress=compress), process_status("VmRSS"))

    pair()
    for samples in both.values():
        samples.clear()
    benchmark.pedantic(pair, rounds=min(3, ROUNDS))
    named = {
        f"{compress}_{name}": both[compress][name]
        for compress in both
        for name in ("capture_ns", "image_bytes")
    }
    benchmark.extra_info.update(size=ZSTD_SIZE, samples=named)
