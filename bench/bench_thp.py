"""Share of memory in huge pages before and after a capture without writers."""

import os

import pytest
from benchkit import ROUNDS, Samples, guest_ram, huge_pages, size
from hugepages import huge_share

import snapengine
from snapengine.guest.params import GuestParams
from snapengine.handover.peer import PeerTarget
from snapengine.process.target import ProcessTarget

SIZE = size("THP_SIZE", "256M")
ENOUGH = 0.9

pytestmark = [pytest.mark.timeout(120), pytest.mark.benchmark(group="thp")]


def measure(benchmark, make_target, pid, addr):
    """Capture the same memory repeatedly: a huge page that one capture splits stays split."""
    samples = Samples()
    benchmark.extra_info.update(size=SIZE, samples=samples)
    first = huge_share(pid, addr)
    if first < ENOUGH:
        pytest.skip("the kernel gave no huge pages: see /sys/kernel/mm/transparent_hugepage/enabled")

    def save():
        with snapengine.snapshot(make_target(), "null:") as capture:
            pass
        samples.note(capture_ns=capture.result.duration_ns, huge_kept_ratio=huge_share(pid, addr) / first)

    benchmark.pedantic(save, rounds=ROUNDS)


def bench_thp_own_buffer(benchmark, floors):
    with huge_pages(SIZE) as memory:
        floors.fill(memory)
        measure(benchmark, lambda: snapengine.BufferTarget(memory), os.getpid(), floors.address_of(memory))


@pytest.mark.parametrize("how", ["peer", "attached"])
def bench_thp_guest(benchmark, start_guest, how):
    guest, socket = start_guest(GuestParams(size=SIZE, pages="thp", incompressible=True), 0)
    addr = guest_ram(guest.pid, SIZE)
    make = {"peer": lambda: PeerTarget(socket), "attached": lambda: ProcessTarget(guest.pid)}[how]
    measure(benchmark, make, guest.pid, addr)
