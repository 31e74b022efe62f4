"""Attaching: how long threads are stopped, arming against bare ioctls, and lost work against fork."""

import os
import time

import pytest
from benchkit import ROUNDS, Samples, guest_ram, size, warm_file
from writerkit import bins_around, lost_work_ms, undisturbed

import snapengine
from snapengine.guest.params import GuestParams
from snapengine.kernel.uffd import FEATURES, MODE_WP, Uffd
from snapengine.options import MIB, Options
from snapengine.process.inject import inject_userfaultfd
from snapengine.process.target import ProcessTarget

SIZE = size("ATTACH_SIZE", "1G")
LIMIT = 64 * MIB
INJECTIONS = 30
BEFORE_NS = 300_000_000
TAIL_S = 0.3

pytestmark = [pytest.mark.timeout(300), pytest.mark.benchmark(group="attach")]


@pytest.mark.parametrize("threads", [1, 3])
def bench_injection(benchmark, start_guest, threads):
    """How long one thread of a busy process is stopped to open a userfaultfd, which tracks nothing."""
    guest, _ = start_guest(GuestParams(size=SIZE, threads=threads, incompressible=True), None)
    samples = Samples()
    benchmark.extra_info.update(size=SIZE, threads=threads, samples=samples)

    def inject():
        injected = inject_userfaultfd(guest.pid)
        os.close(injected.fd)
        samples.note(injection_stop_ns=injected.stop_ns)

    benchmark.pedantic(inject, rounds=INJECTIONS, warmup_rounds=2)


def bench_attach_arm(benchmark, start_guest):
    """arm_ns of a soft cut against one register and one protect call for the same memory, without writes."""
    guest, _ = start_guest(GuestParams(size=SIZE, incompressible=True), 0)
    addr = guest_ram(guest.pid, SIZE)
    samples = Samples()
    benchmark.extra_info.update(size=SIZE, samples=samples, floors={"arm_ns": "bare_ns"})

    def bare():
        with Uffd(FEATURES["PAGEFAULT_FLAG_WP"], inject_userfaultfd(guest.pid).fd) as uffd:
            began = time.monotonic_ns()
            uffd.register(addr, SIZE, MODE_WP)
            uffd.protect(addr, SIZE)
            samples.note(bare_ns=time.monotonic_ns() - began)

    def arm():
        with snapengine.snapshot(ProcessTarget(guest.pid), "null:") as capture:
            pass
        samples.note(arm_ns=capture.result.arm_ns)

    arm()
    samples.clear()
    benchmark.pedantic(arm, setup=bare, rounds=ROUNDS)
    pairs = zip(samples["arm_ns"], samples["bare_ns"], strict=True)
    samples["arm_ratio"] = [arm_ns / bare_ns for arm_ns, bare_ns in pairs]


def ended(pid):
    """Whether a process that is not our child has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def bench_lost_work(benchmark, start_guest, tmpfs):
    """Lost work of a writer at full speed: attach and save, against a forked child that writes the file."""
    guest, _ = start_guest(GuestParams(size=SIZE, incompressible=True), None)
    samples, work = Samples(), {}
    options = Options(memory_limit=LIMIT, spill_dir=str(tmpfs.parent))
    floors = {"attach_lost_ns": "fork_lost_ns"}
    benchmark.extra_info.update(size=SIZE, memory_limit=LIMIT, samples=samples, work=work, floors=floors)

    def attach():
        with snapengine.snapshot(ProcessTarget(guest.pid), tmpfs, options) as capture:
            pass
        samples.note(injection_ns=capture.result.injection_ns, faults=capture.result.faults)

    def fork():
        child = guest.fork(tmpfs)
        while not ended(child):
            time.sleep(0.005)

    def alternate():
        for name, save in (("attach", attach), ("fork", fork)):
            rate = undisturbed(guest.bins)
            tmpfs.unlink(missing_ok=True)
            warm_file(tmpfs, SIZE + SIZE // 64)  # here, as the host takes back free memory within a second
            began = time.monotonic_ns()
            save()
            done = time.monotonic_ns()
            time.sleep(TAIL_S)
            lost = lost_work_ms(guest.bins(began), began, time.monotonic_ns(), rate)
            work[name] = bins_around(guest.bins(began - BEFORE_NS), began, done)
            samples.note(**{f"{name}_ns": done - began, f"{name}_lost_ns": lost * 1e6})
        samples.note(lost_ratio=samples["attach_lost_ns"][-1] / max(samples["fork_lost_ns"][-1], 1.0))

    alternate()
    samples.clear()
    benchmark.pedantic(alternate, rounds=ROUNDS)
