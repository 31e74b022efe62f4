"""Injection: the engine gets a userfaultfd of the target, and the target notices nothing."""

import contextlib
import ctypes
import errno
import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from targetkit import (
    CALLS,
    COUNTERS,
    ERRORS,
    MEMORY,
    PAGES,
    VALUES,
    Target,
    descriptors,
    inject,
    refusal,
    state_of,
    status_line,
    until,
)
from waitkit import PATIENCE_S, attempts

import snapengine
from snapengine.kernel.uffd import FEATURES, Uffd
from snapengine.process import permissions
from snapengine.process.inject import inject_userfaultfd

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)


# The descriptor


@pytest.mark.parametrize("threads", [1, 3])
def test_the_descriptor_works_from_outside(threads):
    with Target("compute", threads) as target:
        before = descriptors(target.pid)
        injected = inject_userfaultfd(target.pid, deadline=PATIENCE_S)
        assert injected.tid in target.tids
        assert injected.stop_ns > 0
        assert not os.get_inheritable(injected.fd)
        assert descriptors(target.pid) == before
        start, length = target.words[MEMORY], target.words[PAGES] * PAGE
        with Uffd(FEATURES["PAGEFAULT_FLAG_WP"], fd=injected.fd) as uffd:
            uffd.register(start, length)
            uffd.protect(start, length)
            faults = set()
            until(lambda: faults.update(released(uffd, start)) or len(faults) == target.words[PAGES])
            target.check_running(threads)
        before = target.counters(threads)
        until(lambda: min(a - b for a, b in zip(target.counters(threads), before, strict=True)) > 3000)
        target.check_running(threads)


def released(uffd, start):
    """Read and resolve a write fault; the list of its page."""
    try:
        message = os.read(uffd.fd, 32)
    except BlockingIOError:
        return []
    event, flags, address = struct.unpack_from("<B7xQQ", message)
    assert event == 0x12
    assert flags & 2, "not a write-protect fault"
    page = address // PAGE * PAGE
    uffd.unprotect(page, PAGE)
    return [(page - start) // PAGE]


# Side effects that the target could notice


@pytest.mark.parametrize("arguments", [[1], [3], [64], [2, "leave"]], ids=str)
def test_registers_are_kept(arguments):
    vector = ["avx"] if "avx2" in Path("/proc/cpuinfo").read_text() else []
    with Target("compute", *arguments, *vector) as target:
        if "leave" in arguments:  # pthread_exit() opens libgcc for a moment
            until(lambda: state_of(target.pid) == "Z")
        before = descriptors(target.tids[-1])
        for _ in range(40 if arguments[0] < 10 else 8):
            inject(target.pid)
        target.check_running(arguments[0])
        assert descriptors(target.tids[-1]) == before


@pytest.mark.parametrize("threads", [1, 12])
def test_the_leader_ends_before_it_is_stopped(monkeypatch, threads):
    """The process still lives, so it is not reported as ended."""
    listed = permissions.threads_to_stop

    def leave(pid):
        tids = sorted(listed(pid))
        target.words[VALUES] = 1
        until(lambda: state_of(pid) == "Z")
        return tids

    with Target("compute", threads, "leave", "linger") as target:
        monkeypatch.setattr(permissions, "threads_to_stop", leave)
        assert inject(target.pid).tid != target.pid
        target.check_running(threads)


def test_threads_that_all_end_before_they_are_stopped(monkeypatch):
    """The attempts end, and the text does not say that the process has ended."""
    gone = itertools.count(1 << 22)  # above every tid (proc_pid_max(5))
    monkeypatch.setattr(permissions, "threads_to_stop", lambda pid: [next(gone)])
    with Target("compute", 1) as target:
        assert "each thread ends before" in str(refusal(target.pid))
        target.check_running()


def test_an_ignored_sigtrap_stays_ignored():
    with Target("compute", 1, "notrap") as target:
        ignored = status_line(target.pid, "SigIgn")
        for _ in range(10):
            inject(target.pid)
        target.check_running()
        assert status_line(target.pid, "SigIgn") == ignored


def test_scheduling_and_masks_are_kept():
    with Target("signals", "masked") as target:
        os.setpriority(os.PRIO_PROCESS, target.pid, 5)
        until(lambda: state_of(target.pid) == "S")
        before = [os.sched_getscheduler(target.pid), os.getpriority(os.PRIO_PROCESS, target.pid)]
        mask = status_line(target.pid, "SigBlk")
        inject(target.pid)
        assert [os.sched_getscheduler(target.pid), os.getpriority(os.PRIO_PROCESS, target.pid)] == before
        until(lambda: status_line(target.pid, "SigBlk") == mask)


def test_a_restartable_sequence_is_aborted():
    """Its thread may have been moved to another CPU, so the sequence must not be completed."""
    with Target("rseq") as target:
        for _ in range(30):
            inject(target.pid)
            time.sleep(0.001)
        target.check_running(2)


def test_a_restartable_sequence_would_break_without_care():
    with Target("rseq") as target:
        for _ in attempts("no sequence was broken"):
            inject(target.pid, _repair=False)
            if target.words[ERRORS]:
                break
            time.sleep(0.001)


def interrupted(call, repair):
    """(EINTRs, other returns) of a call during 30 injections."""
    with Target("blocking", call) as target:
        for _ in range(30):
            until(lambda: state_of(target.pid) == "S")
            inject(target.pid, _repair=repair)
        until(lambda: state_of(target.pid) == "S")
        return target.words[COUNTERS], target.words[COUNTERS + 64]


@pytest.mark.parametrize("call", CALLS)
def test_no_call_ends_early(call):
    assert interrupted(call, repair=True) == (0, 0)


def test_calls_would_end_early_without_repair():
    assert interrupted("epoll_wait", repair=False)[0] >= 20


def queue_signals(pid, count):
    for value in range(1, count + 1):
        while libc.sigqueue(pid, signal.SIGRTMIN, ctypes.c_void_p(value)) != 0:
            assert ctypes.get_errno() == errno.EAGAIN
            time.sleep(0.001)


@pytest.mark.parametrize("mode", ["busy", "epoll", "masked"])
def test_no_signal_is_lost(mode):
    count = 3000
    with Target("signals", mode) as target:
        sender = threading.Thread(target=queue_signals, args=(target.pid, count))
        sender.start()
        injections = 0
        while sender.is_alive() or injections < 10:
            inject(target.pid)
            injections += 1
        sender.join()
        until(lambda: target.words[COUNTERS] >= count, "signals were lost")
        time.sleep(0.05)
        assert target.words[COUNTERS] == count
        assert target.words[VALUES] == count * (count + 1) // 2
        assert target.words[ERRORS] == 0
        assert target.words[PAGES] == 0, "an EINTR without a signal"


def test_a_stopped_process_stays_stopped():
    with Target("compute", 3) as target:
        os.kill(target.pid, signal.SIGSTOP)
        until(lambda: {state_of(target.pid, tid) for tid in target.tids} == {"T"})
        before = target.counters(3)
        for _ in range(5):
            inject(target.pid)
        until(lambda: {state_of(target.pid, tid) for tid in target.tids} == {"T"})
        assert target.counters(3) == before
        os.kill(target.pid, signal.SIGCONT)
        target.check_running(3)


def test_stops_and_continues_meanwhile():
    with Target("compute", 2) as target:
        for _ in range(20):
            os.kill(target.pid, signal.SIGSTOP)
            inject(target.pid)
            os.kill(target.pid, signal.SIGCONT)
            inject(target.pid)
        target.check_running(2)


def test_churn():
    with Target("churn") as target:
        for _ in range(60):
            inject(target.pid)
        target.check_running(2)


# The engine dies


INJECT_FOR_EVER = """
import os, sys
from snapengine.process.inject import inject_userfaultfd
print(flush=True)
while True:
    os.close(inject_userfaultfd(int(sys.argv[1]), deadline=100).fd)
"""


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_the_engine_is_killed_at_any_moment(group):
    """30 times each: the target continues with its registers and has no additional descriptor."""
    room = Path(snapengine.__file__).parent.parent
    with Target("compute", 2) as target:
        before = descriptors(target.pid)
        for _ in range(30):
            with subprocess.Popen(
                [sys.executable, "-c", INJECT_FOR_EVER, str(target.pid)],
                env={**os.environ, "PYTHONPATH": str(room)},
                stdout=subprocess.PIPE,
                start_new_session=True,
            ) as engine:
                engine.stdout.readline()
                time.sleep(random.uniform(0, 0.01))
                (os.killpg if group else os.kill)(engine.pid, signal.SIGKILL)
            target.check_running(2)
            until(lambda: descriptors(target.pid) == before, "a descriptor stays in the target")
        time.sleep(0.1)  # the last helper may not have started yet
        until(lambda: descriptors(target.pid) == before, "a descriptor stays in the target")
        until(lambda: {status_line(tid, "TracerPid") for tid in target.tids} == {"0"}, "it is still traced")
        assert {os.sched_getscheduler(tid) for tid in target.tids} == {os.SCHED_OTHER}


INJECT_SOME = """
import os, sys
from snapengine.process.inject import inject_userfaultfd
for _ in range(40):
    os.close(inject_userfaultfd(int(sys.argv[1]), deadline=100).fd)
"""


def test_engines_on_every_cpu():
    """Helpers and stopped threads are in a real-time class: one that spins would starve the others."""
    room = Path(snapengine.__file__).parent.parent
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(Target("compute", 1)) for _ in range(2 * (os.cpu_count() or 1))]
        engines = [
            subprocess.Popen(
                [sys.executable, "-c", INJECT_SOME, str(target.pid)],
                env={**os.environ, "PYTHONPATH": str(room)},
            )
            for target in targets[:8]
        ]
        assert [engine.wait(PATIENCE_S) for engine in engines] == [0] * len(engines)
        for target in targets:
            target.check_running()
