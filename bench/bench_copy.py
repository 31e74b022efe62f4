"""Idle capture into the null sink against one memcpy of the same bytes, alternated."""

import time

import pytest
from benchkit import BATCH_BYTES, ROUNDS, Samples, guest_ram, huge_pages, protect_floor, size, small_pages

import snapengine
from snapengine.guest.params import GuestParams
from snapengine.handover.peer import PeerTarget

SIZE = size("COPY_SIZE", "1G")
MINIMUM = ("ioctl_protect_ns", "memcpy_ns", "ioctl_unprotect_64_ns")

pytestmark = [pytest.mark.timeout(300), pytest.mark.benchmark(group="copy")]


@pytest.fixture(scope="module")
def destination(floors):
    """A destination of the same size, populated."""
    memory = huge_pages(SIZE)
    floors.fill(memory, 1)
    return memory


@pytest.fixture(scope="module")
def small_destination(floors):
    """The same in 4 KiB pages, like a program's ordinary second buffer."""
    memory = small_pages(SIZE)
    floors.fill(memory, 1)
    return memory


@pytest.fixture(scope="module")
def source(floors):
    """The source, populated, in 4 KiB pages."""
    memory = small_pages(SIZE)
    floors.fill(memory)
    return memory


def save(make_target, samples):
    """One capture into the null sink; notes the time of each part."""
    began = time.monotonic_ns()
    with snapengine.snapshot(make_target(), "null:") as capture:
        at_t = time.monotonic_ns()
    ended = time.monotonic_ns()
    result = capture.result
    assert result.faults == 0
    assert result.pages_saved == SIZE // 4096
    samples.note(
        capture_ns=ended - began,
        prepare_ns=at_t - began - result.arm_ns,
        arm_ns=result.arm_ns,
        save_ns=ended - at_t,
    )


def measure(benchmark, make_target, floor, best="memcpy_ns"):
    """Alternate `floor`, which returns samples, with captures. The first pair is not counted.

    `best`: the sample that is the floor of a capture.
    """
    samples = Samples()
    benchmark.extra_info.update(size=SIZE, samples=samples, floors={"capture_ns": best})
    floor()
    save(make_target, Samples())
    benchmark.pedantic(save, setup=lambda: samples.note(**floor()),
                       args=(make_target, samples), rounds=ROUNDS)  # fmt: skip
    pairs = zip(samples["memcpy_ns"], samples["capture_ns"], strict=True)
    samples["memcpy_ratio"] = [memcpy / capture for memcpy, capture in pairs]
    pairs = zip(samples["memcpy_4k_ns"], samples["capture_ns"], strict=True)
    samples["memcpy_4k_ratio"] = [memcpy / capture for memcpy, capture in pairs]
    if "process_vm_readv_ns" in samples:
        pairs = zip(samples["process_vm_readv_ns"], samples["capture_ns"], strict=True)
        samples["process_vm_readv_ratio"] = [read / capture for read, capture in pairs]
    if "ioctl_protect_ns" in samples:  # the minimum for one thread: protect, copy, un-protect
        parts = zip(*(samples[name] for name in MINIMUM), samples["capture_ns"], strict=True)
        samples["least_work_ratio"] = [sum(least) / capture for *least, capture in parts]


def bench_copy_own_buffer(benchmark, floors, source, destination, small_destination):
    def floor():
        return {
            "memcpy_ns": floors.copy_ns(destination, source),
            "memcpy_4k_ns": floors.copy_ns(small_destination, source),
            **protect_floor(floors, source),
        }

    measure(benchmark, lambda: snapengine.BufferTarget(source), floor)


@pytest.mark.parametrize("backing", ["anon", "memfd"])
def bench_copy_guest(benchmark, floors, source, destination, small_destination, start_guest, backing):
    guest, socket = start_guest(GuestParams(size=SIZE, backing=backing, incompressible=True), 0)
    addr = guest_ram(guest.pid, SIZE)
    buffer = memoryview(destination)[:BATCH_BYTES]

    def floor():
        read = floors.vm_read_ns(guest.pid, addr, SIZE, buffer)
        return {
            "memcpy_ns": floors.copy_ns(destination, source),
            "memcpy_4k_ns": floors.copy_ns(small_destination, source),
            "process_vm_readv_ns": read,
        }

    best = "process_vm_readv_ns" if backing == "anon" else "memcpy_ns"
    measure(benchmark, lambda: PeerTarget(socket), floor, best)
