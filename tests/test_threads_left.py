"""After any failure no thread of ours is left when the call returns: neither of Python nor of the engine."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import resource
import threading

import pytest
import streamkit as kit
from handoverkit import fds_before, open_fds
from targetkit import until

import snapengine
from snapengine.errors import CaptureCancelled, LostPagesError, MachineError, SinkError, SnapengineError
from snapengine.image import open_image
from snapengine.options import DIRTY_LOGGING, WRITE_TRACKING, Options
from snapengine.qemu.from_stream import ingest
from snapengine.qemu.monitor import Monitor
from snapengine.storage.sinks import Sink

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left():
    threads, files = tasks(), fds_before()
    assert len(threading.enumerate()) == 1
    gc.disable()  # files that only the collector would close count as left behind
    try:
        yield
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
        # A thread that Python has joined may still be exiting.
        until(lambda: tasks() <= threads, "a native thread is left")
        assert open_fds() == files
    finally:
        gc.enable()


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


class Failing(Sink):
    """A sink that fails after `room` bytes, or when the image is complete."""

    def __init__(self, room: int, at_commit: bool = False) -> None:
        super().__init__("failing")
        self.fd = -2  # no descriptor: `write` is called
        self._room = room
        self._at_commit = at_commit

    def write(self, data) -> None:
        self._room -= len(data)
        if self._room < 0:
            raise SinkError(errno.ENOSPC, "failing: the disk is full")

    def commit(self) -> None:
        if self._at_commit:
            raise SinkError(errno.EIO, "failing: the disk is broken")

    def abort(self) -> None:
        self._room = -1


def stream_of(data: bytes) -> int:
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def raising(*_):
    raise ZeroDivisionError


INGESTS = {
    "cut": (kit.stream(kit.SOME_PAGES)[:-7], {}),
    "cut in the head": (kit.head()[:30], {}),
    "empty": (b"", {}),
    "no stream": (b"x" * 1000, {}),
    "sink at once": (kit.stream(kit.SOME_PAGES), {"sink": Failing(0)}),
    "sink later": (kit.stream(kit.SOME_PAGES), {"sink": Failing(600)}),
    "commit": (kit.stream(kit.SOME_PAGES), {"sink": Failing(MIB, True)}),
    "finish": (kit.stream(kit.SOME_PAGES), {"finish": raising}),
    "spill": (kit.stream(kit.SOME_PAGES), {"options": Options(spill_dir="/nonexistent")}),
}


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("what", INGESTS)
def test_a_failed_ingest(what, direct):
    data, how = INGESTS[what]
    fd = stream_of(data)
    sink = how.get("sink", "null:")
    if direct and what == "spill":
        how = {"finish": raising}  # with `direct` there is no spool file
    try:
        with pytest.raises((SnapengineError, OSError, ZeroDivisionError)):
            ingest(fd, sink, how.get("options"), direct=direct, finish=how.get("finish"))
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
    finally:
        os.close(fd)


def test_an_ingest_whose_watcher_raises():
    theirs, ours = os.pipe()
    os.write(ours, kit.head())
    try:
        with pytest.raises(ZeroDivisionError):
            ingest(theirs, "null:", watch=raising)
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
    finally:
        os.close(theirs)
        os.close(ours)


CAPTURES = {
    "sink at once": (SinkError, {"sink": Failing(0)}),
    "sink later": (SinkError, {"sink": Failing(MIB)}),
    "commit": (SinkError, {"sink": Failing(64 * MIB, True)}),
    "vmstate": (ZeroDivisionError, {"vmstate": raising}),
    "resume": (ZeroDivisionError, {"resume": raising}),
    "pause": (ZeroDivisionError, {"pause": raising}),
    "vmstate, and resume": (ZeroDivisionError, {"vmstate": raising, "resume": raising}),
}


@pytest.mark.usefixtures("requires_uffd")
@pytest.mark.parametrize("method", [WRITE_TRACKING, DIRTY_LOGGING])
@pytest.mark.parametrize("what", CAPTURES)
def test_a_failed_capture(what, method):
    error, how = CAPTURES[what]
    buffer = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(8 * MIB))
    calls = {name: how.get(name, lambda: None) for name in ("pause", "resume")}
    target = snapengine.BufferTarget(buffer, vmstate=how.get("vmstate"), **calls)
    with pytest.raises(error), snapengine.snapshot(target, how.get("sink", "null:"), method=method):
        pass
    buffer.close()


@pytest.mark.usefixtures("requires_uffd")
def test_a_cancelled_capture_and_one_that_is_strict():
    buffer = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(64 * MIB))
    with pytest.raises(CaptureCancelled), snapengine.snapshot(buffer, "null:", rate_limit=MIB) as capture:
        capture.cancel()
    with pytest.raises(LostPagesError), snapengine.snapshot(
        buffer, "null:", rate_limit=100 * MIB, strict=True, memory_limit=16 * MIB
    ):
        buffer.madvise(mmap.MADV_DONTNEED)
    buffer.close()


def test_a_damaged_image_restored_by_several_threads(tmp_path):
    buffer = mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(16 * MIB))
    with snapengine.snapshot({"ram": buffer}, tmp_path / "image"):
        pass
    data = bytearray((tmp_path / "image").read_bytes())
    data[8 * MIB] ^= 1
    (tmp_path / "image").write_bytes(data)
    with open_image(tmp_path / "image") as image, pytest.raises(snapengine.ImageError):
        image.restore_into("ram", bytearray(16 * MIB), threads=4)
    buffer.close()


def test_a_monitor_that_is_none(tmp_path):
    with pytest.raises(MachineError):
        Monitor(str(tmp_path / "none"))


@pytest.mark.parametrize("free", range(5))
def test_a_monitor_without_descriptors(tmp_path, free):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + free, hard))
    try:
        with pytest.raises((MachineError, OSError)):
            Monitor(str(tmp_path / "none"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("requires_uffd")
@pytest.mark.parametrize("complete", [True, False])
def test_a_block_that_raises(tmp_path, complete):
    """It cancels the capture; an image that was complete before stays, and the result tells."""
    buffer = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(8 * MIB))
    path = tmp_path / "image"
    rate = 0 if complete else MIB
    capture = snapengine.snapshot(buffer, path, rate_limit=rate)

    def block():
        with capture:
            assert not complete or capture.wait(60)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    if complete:
        assert capture.result.pages_saved == 2048
        with open_image(path) as image:
            assert image.verify().data_pages == 2048
    else:
        with pytest.raises(CaptureCancelled):
            assert capture.result
        assert os.listdir(tmp_path) == []
    buffer.close()
