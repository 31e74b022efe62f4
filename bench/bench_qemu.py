"""`make bench-qemu`: machines of stock QEMU, saved live by QEMU itself and by our engine, alternated.

Not a part of `make bench` (see conftest.py). One machine per hot set; every way saves it.
"""

import os

import pytest
import qemu_ways
from benchkit import size, warm_file
from hugepages import HUGE, collapse, huge_share, no_huge_pages
from qemu_names import BACKGROUND, MAIN, MAY_GIVE_UP, OURS
from qemukit import Machines, find_qemu, kvm_usable, qemu_version
from sweepkit import MIB, START, Sweep

SIZE = size("QEMU_SIZE", "1G")
ROUNDS = int(os.environ.get("SNAPENGINE_BENCH_QEMU_ROUNDS", "3"))
ACCEL = os.environ.get("SNAPENGINE_BENCH_QEMU_ACCEL") or ("kvm" if kvm_usable() else "tcg")
NOISE = 0.5  # every page has data; zstd can halve it
HOT_SETS = (31 * MIB, MAIN, SIZE - START)
SINK_RATES = (0, 200 * MIB)
HUGE_ENOUGH = 0.95

pytestmark = [pytest.mark.timeout(480), pytest.mark.benchmark(group="qemu")]


@pytest.fixture(scope="module")
def machines():
    """Starts machines and ends them after the module. Skips without QEMU."""
    if find_qemu() is None:
        pytest.skip("no QEMU: qemu-system-x86_64 is not in PATH, and QEMU is not set")
    with Machines() as started:
        yield started


def sweep(hot):
    return Sweep(SIZE, START + hot, NOISE)


@pytest.fixture(scope="module", params=HOT_SETS, ids=lambda hot: f"hot-{hot // MIB}")
def hot_machine(request, machines):
    """(Bytes of the hot set, a running machine with its RAM in huge pages)."""
    machine = machines(sweep(request.param), accel=ACCEL).ready()
    yield request.param, machine
    machine.kill()


@pytest.fixture
def small_machine(machines):
    """A running machine with its RAM in 4 KiB pages and a hot set of MAIN bytes."""
    with no_huge_pages():
        machine = machines(sweep(MAIN), accel=ACCEL)
    yield machine.ready()
    machine.kill()


def settle(machine, huge, path):
    """Give every way the same memory: background-snapshot leaves the RAM in small pages."""
    path.unlink(missing_ok=True)
    warm_file(path, SIZE + SIZE // 64)
    if huge and huge_share(machine.pid, machine.ram_address) < HUGE_ENOUGH:
        first = -(-machine.ram_address // HUGE) * HUGE
        collapse(machine.pid, first, machine.ram_address + SIZE - first)
    machine.wait_progress(machine.guest.pages)  # a sweep populates KVM's page tables again


def compared(ours, background):
    """Ours against background-snapshot, round by round; below 1 ms (or 1 byte) a sample cannot tell."""
    samples = {"stop_ns": [run["stop_ns"] for run in ours]}
    for name, least in (("total_ns", 1e6), ("lost_ns", 1e6), ("gap_ns", 1e6), ("image_bytes", 1.0)):
        pairs = zip(ours, background, strict=True)
        ratios = [max(run[name], least) / max(other[name], least) for run, other in pairs]
        samples[f"{name.rsplit('_', 1)[0]}_ratio"] = ratios
    return samples


def compare(benchmark, machine, ways, path, rounds, hot, sink_rate=0, huge=True):
    """Save by each of `ways` in turn, in `rounds` rounds."""
    runs = {way: [] for way in ways}
    benchmark.extra_info.update(
        size=SIZE, hot=hot, sink_rate=sink_rate, huge=huge, accel=ACCEL, runs=runs,
        version=".".join(map(str, qemu_version(machine.qemu))), load=os.getloadavg()[0],
    )  # fmt: skip

    def alternate():
        for way in ways:
            settle(machine, huge, path)
            share = huge_share(machine.pid, machine.ram_address)
            run = qemu_ways.measure(machine, way, path, sink_rate)
            assert run["completed"] or way in MAY_GIVE_UP, (way, run["why"])
            runs[way].append(run | {"huge_ratio": share})

    benchmark.pedantic(alternate, rounds=rounds)
    if hot == MAIN and not sink_rate:
        benchmark.extra_info["samples"] = compared(runs[OURS], runs[BACKGROUND])


@pytest.mark.parametrize("sink_rate", SINK_RATES, ids=lambda rate: f"sink-{rate // MIB}")
def bench_qemu(benchmark, hot_machine, sink_rate, tmpfs):
    hot, machine = hot_machine
    rounds = ROUNDS if hot == MAIN and not sink_rate else 1
    compare(benchmark, machine, qemu_ways.ways(machine.qemu), tmpfs, rounds, hot, sink_rate)


def bench_qemu_small_pages(benchmark, small_machine, tmpfs):
    ways = (BACKGROUND, OURS)
    compare(benchmark, small_machine, ways, tmpfs, ROUNDS, MAIN, huge=False)
