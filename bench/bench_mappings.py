"""Many mappings against one of the same size, and memory with a reservation against memory without.

Another process holds the memory and is captured by attaching. The two variants alternate.
"""

import os
import resource
import subprocess
import sys
import time

import pytest
from benchkit import KIB, MIB, ROUNDS, Samples, size

import snapengine
from snapengine.process.target import ProcessTarget

MAPPINGS = int(os.environ.get("SNAPENGINE_BENCH_MAPPINGS", "30000"))
EACH = size("MAPPING_SIZE", "16K")
RESERVED = size("RESERVED_SIZE", "20T")
USED = size("RESERVED_USED", "200M")

TARGET = """
import ctypes, mmap, sys
reserved, used, parts, each = map(int, sys.argv[1:])
memory = mmap.mmap(-1, reserved, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
memory.madvise(mmap.MADV_NOHUGEPAGE)
addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
munmap = ctypes.CDLL(None, use_errno=True).munmap
munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
half = used // 2 // 4096 * 4096
for start in (0, reserved - half):      # at both ends
    for at in range(start, start + half, 1 << 20):
        piece = min(1 << 20, start + half - at)
        memory[at : at + piece] = b"\\x5a" * piece
for number in range(parts):             # every second piece stays
    assert munmap(addr + (2 * number + 1) * each, each) == 0
print("ready", flush=True)
sys.stdin.read()
"""

pytestmark = [pytest.mark.timeout(600), pytest.mark.benchmark(group="mappings")]


@pytest.fixture
def start_target():
    """``start_target(reserved, used, parts, each)``: the pid of a process that ends after the bench."""
    started = []

    def start(reserved, used, parts=0, each=4 * KIB):
        command = [sys.executable, "-c", TARGET, *map(str, (reserved, used, parts, each))]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1].pid

    yield start
    for process in started:
        process.communicate()


def start_of(pid, cut):
    """CPU time of this process until T, and the result."""
    began = time.process_time_ns()
    with snapengine.snapshot(ProcessTarget(pid, cut=cut), "null:") as capture:
        start_ns = time.process_time_ns() - began
    return start_ns, capture.result


def alternate(samples, pids, cut):
    """One round: capture both, and note the ratios."""
    found = {}
    for name, pid in pids.items():
        start_ns, result = start_of(pid, cut)
        found[name] = start_ns, result
        samples.note(**{f"{name}_start_ns": start_ns, f"{name}_arm_ns": result.arm_ns})
        samples.note(**{f"{name}_stop_ns": result.stop_ns, f"{name}_capture_ns": result.duration_ns})
    (one, of_one), (other, of_other) = found.values()
    samples.note(start_ratio=other / one, arm_ratio=of_other.arm_ns / of_one.arm_ns)
    if of_one.stop_ns:
        samples.note(stop_ratio=of_other.stop_ns / of_one.stop_ns)


@pytest.mark.parametrize("cut", ["soft", "stop"])
def bench_mappings(benchmark, start_target, cut):
    """MAPPINGS mappings of EACH bytes, against one of the same total size."""
    used = MAPPINGS * EACH
    pids = {"one": start_target(used, used), "many": start_target(2 * used, 2 * used, MAPPINGS, EACH)}
    samples = Samples()
    alternate(Samples(), pids, cut)
    benchmark.pedantic(lambda: alternate(samples, pids, cut), rounds=ROUNDS)
    benchmark.extra_info.update(size=used, mappings=MAPPINGS, cut=cut, samples=samples)


@pytest.mark.parametrize("cut", ["soft", "stop"])
def bench_reservation(benchmark, start_target, cut):
    """RESERVED bytes of which USED are populated, against USED bytes alone."""
    pids = {"none": start_target(USED, USED), "reserved": start_target(RESERVED, USED)}
    samples = Samples()
    alternate(Samples(), pids, cut)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    benchmark.pedantic(lambda: alternate(samples, pids, cut), rounds=ROUNDS)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB - before
    samples.note(grown_bytes=grown)
    assert grown < 64 * MIB + USED // (16 * KIB)
    benchmark.extra_info.update(size=USED, reserved=RESERVED, cut=cut, samples=samples)
