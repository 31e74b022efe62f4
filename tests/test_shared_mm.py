"""Processes that share the memory of another process: they are stopped together with it."""

import errno
import os
import struct
import time

import pytest
from patientkit import Freezer
from targetkit import MEMORY, PAGES, VALUES, Target, refuse_in, state_of, status_line, traced, until

import snapengine
from snapengine.errors import AttachError
from snapengine.image import open_image
from snapengine.process import permissions
from snapengine.process.target import ProcessTarget, kernel_writers

pytestmark = pytest.mark.usefixtures("programs")


def counted(target, n):
    until(lambda: all(target.counters(n)), "somebody does not count")
    return target


@pytest.mark.parametrize(("mode", "counters"), [("share", 2), ("threads", 3)])
def test_who_shares_the_memory_stands(mode, counters):
    with Target("sharer", mode) as target:
        counted(target, counters)
        other = target.words[VALUES]
        for _ in range(5):
            with Freezer(target.pid) as freezer:
                assert freezer.sharers == [other]
                assert {state_of(other, int(tid)) for tid in os.listdir(f"/proc/{other}/task")} == {"t"}
                before = target.counters(counters)
                time.sleep(0.02)
                assert target.counters(counters) == before
            assert {thread.tid for thread in freezer.threads()} == set(target.tids)
            assert freezer.warnings() == []
            target.check_running(counters)
        until(lambda: status_line(other, "TracerPid") == "0")


def test_asked_of_the_one_it_is_shared_with():
    """The child's own snapshot stops its parent."""
    with Target("sharer", "share") as target:
        counted(target, 2)
        with Freezer(target.words[VALUES]) as freezer:
            assert freezer.sharers == [target.pid]
            assert state_of(target.pid) == "t"
            before = target.counters(2)
            time.sleep(0.02)
            assert target.counters(2) == before
        target.check_running(2)


def test_a_child_of_vfork_and_who_waits_for_it():
    """The waiting thread sleeps in the kernel, where it cannot stop: the freezer does not wait for it."""
    with Target("sharer", "vfork") as target:
        counted(target, 2)
        other = target.words[VALUES]
        waiting = next(tid for tid in target.tids if state_of(target.pid, tid) == "D")
        for _ in range(3):
            with Freezer(target.pid) as freezer:
                assert freezer.sharers == [other]
                before = target.counters(3)
                time.sleep(0.02)
                assert target.counters(3) == before
            assert {thread.tid for thread in freezer.threads()} == set(target.tids) - {waiting}
            assert f"thread {waiting} waits for the child of its vfork" in " ".join(freezer.warnings())
            target.check_running(2)
        with Freezer(target.pid):
            target.words[511] = 1
            os.kill(other, 9)  # the child ends while all are stopped: its parent must not continue
            until(lambda: state_of(target.pid, waiting) != "D")
            time.sleep(0.02)
            assert target.counters(3)[2] == 0
        until(lambda: target.counters(3)[2] > 0, "the parent does not continue")
        until(lambda: {status_line(tid, "TracerPid") for tid in target.tids} == {"0"})


def test_processes_that_come_and_go_meanwhile():
    with Target("sharer", "churn") as target:
        counted(target, 2)
        for _ in range(30):
            with Freezer(target.pid):
                before = target.counters(2)
                time.sleep(0.005)
                assert target.counters(2) == before
        target.check_running(2)


def test_one_that_is_traced_by_another():
    with Target("sharer", "share") as target:
        counted(target, 2)
        other = target.words[VALUES]
        with traced(other):
            error = refuse_in(Freezer(target.pid).stop, AttachError)
            assert error.errno == errno.EBUSY
            assert f"shares its memory with process {other} (sharer), which is being traced" in str(error)
        target.check_running(2)
        assert {status_line(tid, "TracerPid") for tid in target.tids} == {"0"}


def test_other_processes_are_left_alone():
    """Neither a forked child, which has a copy of the memory, nor any other process."""
    with Target("odd", "zombie") as target, Target("compute", 2) as other, Freezer(target.pid) as freezer:
        assert freezer.sharers == []
        other.check_running(2)


@pytest.mark.usefixtures("requires_uffd")
def test_a_stop_cut_is_one_state(tmp_path):
    """.data is copied, the anonymous page tracked: the other process writes to both in turn."""
    with Target("sharer", "share") as target:
        counted(target, 2)
        for number in range(6):
            path = tmp_path / f"image{number}"
            with snapengine.snapshot(ProcessTarget(target.pid, cut="stop", deadline=20), path):
                pass
            with open_image(path) as image:
                words = [image.read_at(target.words[place], 8) for place in (MEMORY, PAGES)]
            first, second = (struct.unpack("<Q", word)[0] for word in words)
            assert first - 1 <= second <= first
        target.check_running(2)


@pytest.mark.usefixtures("requires_uffd")
def test_rounds_end_in_one_state(tmp_path):
    with Target("sharer", "share") as target:
        counted(target, 2)
        process = ProcessTarget(target.pid, method="dirty-logging", deadline=20)
        options = {"method": "dirty-logging", "max_rounds": 50}
        with snapengine.snapshot(process, tmp_path / "image", **options) as capture:
            pass
        assert capture.result.status == "completed"
        with open_image(tmp_path / "image") as image:
            words = [image.read_at(target.words[place], 8) for place in (MEMORY, PAGES)]
        first, second = (struct.unpack("<Q", word)[0] for word in words)
        assert first - 1 <= second <= first


def test_kernel_aio_is_named():
    with Target("blocking", "io_getevents") as target:
        (text,) = kernel_writers(target.pid, "soft")
        assert "AIO" in text


def test_workers_of_the_kernel_are_named(monkeypatch):
    with Target("compute", 3) as target:
        assert kernel_writers(target.pid, "stop") == []
        plain = permissions.thread_stat

        def as_worker(pid, tid):
            stat = plain(pid, tid)
            flags = stat.flags | permissions.PF_IO_WORKER if tid == target.tids[-1] else stat.flags
            return permissions.ThreadStat(tid, stat.name, stat.state, flags)

        monkeypatch.setattr(permissions, "thread_stat", as_worker)
        assert "1 workers of the kernel" in kernel_writers(target.pid, "stop")[0]
        assert kernel_writers(target.pid, "soft") == []
