"""Floors: the best that the machine can do, which all other figures are compared with."""

import os

import pytest
from benchkit import KIB, MIB, ROUNDS, Samples, guest_ram, huge_pages, protected, size, small_pages
from floorkit import fault_ns, in_thread, spread_ns
from hugepages import HUGE, huge_share

from snapengine.guest.memory import GuestMemory
from snapengine.guest.params import GuestParams
from snapengine.guest.writers import GuestWriters

SIZE = size("FLOOR_SIZE", "256M")
GIB = 1 << 30
FAULTS = min(SIZE, 16 * MIB)
PAGE = 4 * KIB
UNITS = {"1_page": PAGE, "64_pages": 64 * PAGE, "512_pages": 512 * PAGE}
RUNS = {"1_page": PAGE, "16_pages": 16 * PAGE, "64_pages": 64 * PAGE, "512_pages": 512 * PAGE,
        "64_mib": 64 * MIB}  # fmt: skip
HUGE_ENOUGH = 0.95

pytestmark = [pytest.mark.timeout(120), pytest.mark.benchmark(group="floors")]


@pytest.fixture
def source(floors):
    """Memory in 4 KiB pages, populated."""
    memory = small_pages(SIZE)
    floors.fill(memory)
    return memory


def repeat(benchmark, measure):
    """ROUNDS rounds of `measure`, which returns samples, after one that is not counted."""
    samples = Samples()
    benchmark.extra_info.update(size=SIZE, samples=samples)
    measure()
    benchmark.pedantic(lambda: samples.note(**measure()), rounds=max(5, ROUNDS))


def rate(ns):
    """Bytes per second, of a time for all of the memory."""
    return SIZE * 1e9 / ns


def per_gib(ns):
    """Nanoseconds per GiB, of a time for all of the memory."""
    return ns * GIB / SIZE


def bench_floor_memcpy(benchmark, floors, source):
    huge, small, zeros = huge_pages(SIZE), small_pages(SIZE), small_pages(SIZE)
    for memory in (huge, small):
        floors.fill(memory, 1)
    floors.fill(zeros, 0)

    def measure():
        taken, found = floors.zero_test_ns(zeros)
        assert found == 0
        return {
            "memcpy_1_thread_rate": rate(floors.copy_by_threads_ns(huge, source, 1)),
            "memcpy_2_threads_rate": rate(floors.copy_by_threads_ns(huge, source, 2)),
            "memcpy_into_4k_pages_rate": rate(floors.copy_by_threads_ns(small, source, 1)),
            "zero_test_rate": rate(taken),
        }

    repeat(benchmark, measure)


def ioctl_ns(floors, tracked, name, unit):
    """Nanoseconds of one protect and one un-protect ioctl over `unit` bytes."""
    calls = tracked[2] // unit
    pairs = (("protect", True), ("unprotect", False))
    return {f"{word}_{name}_ns": floors.write_protect_ns(*tracked, unit, on) / calls for word, on in pairs}


def bench_floor_protect(benchmark, floors, source):
    with protected(floors, source) as tracked:

        def measure():
            found = {}
            for name, unit in UNITS.items():
                found |= ioctl_ns(floors, tracked, name, unit)
            found["protect_per_gib_ns"] = per_gib(floors.write_protect_ns(*tracked, SIZE, True))
            found["unprotect_per_gib_ns"] = per_gib(floors.write_protect_ns(*tracked, SIZE, False))
            return found

        repeat(benchmark, measure)


def bench_floor_protect_busy(benchmark, floors, source):
    """While a thread of this process runs on another CPU, so that each ioctl flushes that CPU's TLB."""
    part = min(SIZE, 64 * MIB)
    with GuestMemory(GuestParams(size=MIB)) as other, GuestWriters(other) as writers:
        writers.resume()
        with protected(floors, source) as (fd, addr, _):

            def measure():
                found = {}
                for name, unit in UNITS.items():
                    found |= ioctl_ns(floors, (fd, addr, part), f"{name}_busy", unit)
                return found

            repeat(benchmark, measure)


def bench_floor_protect_huge(benchmark, floors):
    memory = huge_pages(SIZE)
    floors.fill(memory)
    with protected(floors, memory) as tracked:  # registering splits it off from neighbours
        if huge_share(os.getpid(), tracked[1]) < HUGE_ENOUGH:
            pytest.skip("the kernel gave no huge pages: see /sys/kernel/mm/transparent_hugepage/enabled")
        repeat(benchmark, lambda: ioctl_ns(floors, tracked, "huge_page", HUGE))


def bench_floor_faults(benchmark, floors):
    """A write fault, by the thread that serves it. The writer runs on the first CPU."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    memory = small_pages(FAULTS)
    floors.fill(memory)
    blocked = {"same_core": (0,), "other_core": (1,), "per_core": (0, 1)}

    def measure():
        found = {}
        for name, cpus in blocked.items():
            with protected(floors, memory, sync=True) as tracked:
                found |= spread_ns(f"fault_{name}", fault_ns(floors, tracked, cpus))
        with protected(floors, memory, sync=False) as tracked:
            found |= spread_ns("fault_spinning", fault_ns(floors, tracked, (1,)))
        taken = in_thread(floors.sigbus_faults_ns, floors.address_of(memory), len(memory), 0)
        return found | spread_ns("fault_sigbus", taken)

    repeat(benchmark, measure)


def bench_floor_vm_read(benchmark, floors, start_guest):
    """process_vm_readv() of another process's private memory, by bytes per call."""
    guest, _ = start_guest(GuestParams(size=SIZE, incompressible=True), 0)
    addr = guest_ram(guest.pid, SIZE)
    buffer = huge_pages(RUNS["64_mib"])
    floors.fill(buffer)

    def measure():
        taken = {}
        for name, length in RUNS.items():
            part = memoryview(buffer)[:length]
            taken[f"vm_read_{name}_rate"] = rate(floors.vm_read_ns(guest.pid, addr, SIZE, part))
        return taken

    repeat(benchmark, measure)


def bench_floor_fork(benchmark, floors, source):
    def measure():
        forked, taken = floors.fork_and_write_ns(source)
        return {"fork_per_gib_ns": per_gib(forked)} | spread_ns("cow_first_write", taken)

    repeat(benchmark, measure)
