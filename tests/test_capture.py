"""One capture end to end on buffers of this process: the content of the image, and failures."""

import ctypes
import errno
import functools
import gc
import io
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory

import numpy as np
import pytest
from capturekit import anonymous, saved, snap
from gatekit import GatedFile
from waitkit import PATIENCE_S, until

import snapengine
from snapengine.image import open_image
from snapengine.storage.sinks import MemorySink

MIB = 1 << 20
PAGE = 4096
pytestmark = pytest.mark.usefixtures("requires_uffd")


def open_fds():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: bytearray(os.urandom(100)), id="bytearray of 100 bytes"),
        pytest.param(lambda: bytearray(os.urandom(3 * PAGE + 17)), id="bytearray of pages and a bit"),
        pytest.param(lambda: bytearray(os.urandom(5 * MIB + 1)), id="bytearray in its own mapping"),
        pytest.param(lambda: np.frombuffer(bytearray(os.urandom(PAGE * 4)), "u1")[5:-9], id="inner slice"),
        pytest.param(lambda: np.random.default_rng(1).random((300, 700)), id="two-dimensional array"),
        pytest.param(lambda: anonymous(2 * MIB), id="mmap without populated pages"),
        pytest.param(lambda: anonymous(2 * MIB, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS), id="shared mmap"),
    ],
)
def test_the_image_holds_the_bytes_at_t(tmp_path, make):
    buffer = make()
    view = memoryview(buffer).cast("B")
    before = bytes(view)

    def scribble():
        for offset in range(0, len(view), 97):
            view[offset] ^= 255

    result = snap(buffer, tmp_path / "image", scribble)
    assert saved(tmp_path / "image") == before
    assert bytes(view) != before
    assert result.region_bytes == len(before)
    assert result.pages_saved + result.zero_pages + result.hole_pages == result.pages_total


def test_shared_memory_object(tmp_path):
    memory = shared_memory.SharedMemory(create=True, size=3 * MIB)
    try:
        head = os.urandom(MIB)
        memory.buf[:MIB] = head  # the rest stays a hole: not even read
        result = snap(memory.buf, tmp_path / "image", lambda: memory.buf.__setitem__(0, 1))
        assert saved(tmp_path / "image") == head + bytes(2 * MIB)
        assert result.hole_pages == 2 * MIB // PAGE
    finally:
        gc.collect()
        memory.close()
        memory.unlink()


class Tensor:
    """The part of PyTorch's tensor interface that the capture uses."""

    def __init__(self, array, device="cpu", contiguous=True):
        self.array, self.device, self.contiguous = array, device, contiguous

    def data_ptr(self):
        return self.array.ctypes.data

    def numel(self):
        return self.array.size

    def element_size(self):
        return self.array.itemsize

    def is_contiguous(self):
        return self.contiguous


def test_cpu_tensor(tmp_path):
    array = np.arange(100_000, dtype="f4")
    before = array.tobytes()
    snap(Tensor(array), tmp_path / "image", lambda: array.fill(0))
    assert saved(tmp_path / "image") == before


def test_several_buffers_that_share_pages(tmp_path):
    block = np.frombuffer(bytearray(os.urandom(40_000)), "u1")
    parts = {f"part{i}": block[i * 1000 : i * 1000 + 1000] for i in range(40)}
    before = {name: part.tobytes() for name, part in parts.items()}
    snap(parts, tmp_path / "image", lambda: block.fill(7))
    for name, content in before.items():
        assert saved(tmp_path / "image", name) == content


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: b"constant", ValueError, "read-only"),
        (lambda: bytearray(), ValueError, "empty"),
        (lambda: np.zeros((10, 10))[:, ::2], ValueError, "contiguous"),
        (lambda: 5, TypeError, "neither a buffer nor a tensor"),
        (lambda: Tensor(np.zeros(4), device="cuda:0"), ValueError, "cuda:0"),
        (dict, ValueError, "no buffers"),
    ],
)
def test_what_is_no_buffer(tmp_path, make, error, text):
    with pytest.raises(error, match=text):
        snapengine.snapshot(make(), tmp_path / "image")
    assert not list(tmp_path.iterdir())


def test_overlapping_buffers_are_refused(tmp_path):
    block = np.zeros(10_000, "u1")
    with pytest.raises(ValueError, match="overlap"):
        snap({"a": block, "b": block[100:200]}, tmp_path / "image")
    assert not list(tmp_path.iterdir())


def test_a_file_mapping_is_refused_by_name(tmp_path):
    file = tmp_path / "data"
    file.write_bytes(bytes(MIB))
    with open(file, "r+b") as handle, mmap.mmap(handle.fileno(), MIB) as view:
        with pytest.raises(snapengine.RegisterError, match=str(file)) as caught:
            snap(view, tmp_path / "image")
        assert caught.value.errno == errno.EINVAL
        view[0] = 1  # the target runs
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_second_snapshot_of_tracked_memory_is_refused(tmp_path):
    buffer = anonymous(64 * MIB)
    buffer[:] = b"t" * len(buffer)
    sink = GatedFile(tmp_path / "one")
    with snapengine.snapshot(buffer, sink, memory_limit=16 * MIB) as capture:
        try:
            with pytest.raises(snapengine.AlreadyTrackedError, match="already being tracked"):
                snap(buffer, tmp_path / "two")
            buffer[0] = 1
        finally:
            sink.gate.set()
    assert capture.result.status == "completed"
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_writer_that_holds_the_gil_never_waits_for_the_sink(tmp_path):
    """Every write below faults while this thread holds the GIL, and the pool is full: if serving a fault
    needed the GIL, the sink or an encoder, this would hang for ever."""
    size = 64 * MIB
    buffer = anonymous(size)
    buffer.madvise(mmap.MADV_NOHUGEPAGE)
    content = np.frombuffer(buffer, "u1")
    content[:] = np.random.default_rng(2).integers(1, 255, size, dtype="u1")
    before = content.tobytes()
    capture = snapengine.snapshot(
        buffer, MemorySink(), memory_limit=16 * MIB, rate_limit=MIB // 4, spill_dir=str(tmp_path)
    )
    with pytest.raises(snapengine.CaptureCancelled), capture:  # noqa: PT012 - the block is what is tested
        for offset in range(0, size, PAGE):
            buffer[offset] = 0
        until(lambda: capture.progress().phase == "writing")  # all pages are saved, few written
        assert capture.progress().image_bytes < 48 * MIB
        capture.cancel()
    assert content[0] == 0
    assert before[0] != 0


def test_the_spilled_image_is_right(tmp_path):
    size = 48 * MIB
    buffer = anonymous(size)
    buffer.madvise(mmap.MADV_NOHUGEPAGE)
    content = np.frombuffer(buffer, "u1")
    content[:] = np.random.default_rng(3).integers(0, 255, size, dtype="u1")
    before = content.tobytes()

    sink = GatedFile(tmp_path / "image")

    def write():
        try:
            for offset in range(0, size, PAGE):
                buffer[offset] = 0
        finally:
            sink.gate.set()

    result = snap(buffer, sink, write, memory_limit=16 * MIB)
    assert result.spilled_bytes > 0
    assert result.peak_buffer_bytes <= 16 * MIB
    assert saved(tmp_path / "image") == before


def test_progress_result_and_one_run_only(tmp_path):
    buffer = anonymous(8 * MIB)
    buffer[:] = b"x" * len(buffer)
    sink = GatedFile(tmp_path / "image")
    capture = snapengine.snapshot(buffer, sink)
    assert capture.progress().phase == "arming"
    with capture:
        try:
            with pytest.raises(RuntimeError, match="not finished"):
                _ = capture.result
            assert capture.progress().pages_total == 8 * MIB // PAGE
            assert not capture.wait(0.001)
        finally:
            sink.gate.set()
    assert capture.progress().phase == "done"
    assert capture.progress().pages_done == 8 * MIB // PAGE
    with pytest.raises(RuntimeError, match="runs once"):
        capture.start()


def test_the_result_is_in_the_image(tmp_path):
    buffer = bytearray(100_000)

    def write():
        buffer[50_000] = 1  # a fault, for the histogram

    result = snap(buffer, tmp_path / "image", write, vmstate={"cpu": b"state"})
    with open_image(tmp_path / "image") as image:
        stats = image.info()["stats"]
        assert dict(image.vmstate) == {"cpu": b"state"}
    assert stats == result.to_json()
    assert stats["image_bytes"] == (tmp_path / "image").stat().st_size


def test_pause_vmstate_and_resume_surround_t(tmp_path):
    calls = []
    target = snapengine.BufferTarget(
        bytearray(MIB),
        pause=lambda: calls.append("pause"),
        resume=lambda: calls.append("resume"),
        vmstate=lambda: calls.append("vmstate") or {"order": b"1"},
    )
    result = snap(target, tmp_path / "image", lambda: calls.append("block"))
    assert calls == ["pause", "vmstate", "resume", "block"]
    assert result.stop_ns >= result.arm_ns
    with open_image(tmp_path / "image") as image:
        assert image.vmstate["order"] == b"1"


def test_a_failing_pause_resumes_and_leaves_nothing(tmp_path):
    calls = []

    def fail():
        raise OSError(5, "no pause today")

    target = snapengine.BufferTarget(bytearray(MIB), pause=fail, resume=lambda: calls.append("resume"))
    with pytest.raises(OSError, match="no pause today"):
        snap(target, tmp_path / "image")
    assert calls == ["resume"]
    assert not list(tmp_path.iterdir())


def test_an_exception_in_the_block_cancels(tmp_path):
    buffer = anonymous(16 * MIB)
    buffer[:] = b"y" * len(buffer)
    with (
        pytest.raises(ZeroDivisionError),
        snapengine.snapshot(buffer, tmp_path / "image", rate_limit=MIB),
    ):
        _ = 1 / 0
    buffer[0] = 1
    assert not list(tmp_path.iterdir())


class FailingFile(io.RawIOBase):
    def __init__(self, room):
        self.room = room

    def writable(self):
        return True

    def write(self, data):
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return len(data)


def test_a_sink_that_fails_half_way_releases_the_target():
    buffer = anonymous(16 * MIB)
    buffer[:] = os.urandom(MIB) * 16
    with pytest.raises(snapengine.SinkError, match="No space left") as caught:
        snap(buffer, FailingFile(3 * MIB), lambda: buffer.__setitem__(slice(0, MIB), bytes(MIB)))
    assert caught.value.errno == errno.ENOSPC
    buffer[:] = bytes(len(buffer))
    assert buffer[5 * MIB] == 0


def test_a_pipe_whose_reader_is_gone():
    buffer = anonymous(16 * MIB)
    buffer[:] = os.urandom(MIB) * 16
    with pytest.raises(snapengine.SinkError) as caught:
        snap(buffer, "exec:head -c 100000 >/dev/null")
    assert caught.value.errno == errno.EPIPE
    buffer[0] = 1


def test_a_full_disk_leaves_no_file(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(mount)], check=True)
    try:
        buffer = bytearray(os.urandom(4 * MIB))
        with pytest.raises(snapengine.SinkError, match="No space left"):
            snap(buffer, mount / "image")
        assert not list(mount.iterdir())
        buffer[0] = 1
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_nothing_is_left_behind(tmp_path):
    buffer = bytearray(os.urandom(2 * MIB))
    snap(buffer, tmp_path / "image")
    gc.collect()
    fds, threads = open_fds(), len(os.listdir("/proc/self/task"))
    for _ in range(5):
        snap(buffer, tmp_path / "image")
        with pytest.raises(snapengine.SinkError):
            snap(buffer, "exec:exit 3")
    gc.collect()
    assert open_fds() == fds
    # A joined thread stays in the kernel's list for a moment.
    until(lambda: len(os.listdir("/proc/self/task")) == threads, "a thread is left")
    buffer.append(1)  # the buffer is no longer exported, so it can be resized


def test_many_captures_from_many_threads(tmp_path):
    errors = []

    def overwrite(buffer):
        for offset in range(0, MIB, PAGE):  # a byte a page: ThreadSanitizer looks up each word
            buffer[offset] = 0

    def work(number):
        try:
            for turn in range(5):
                buffer = anonymous(2 * MIB)
                buffer[:] = bytes([number]) * len(buffer)
                path = tmp_path / f"{number}-{turn}"
                snap(buffer, path, functools.partial(overwrite, buffer))
                assert saved(path) == bytes([number]) * (2 * MIB)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_interrupt_while_waiting_cancels(tmp_path):
    """Ctrl-C while the capture writes into a slow sink: KeyboardInterrupt, and nothing is left."""
    script = f"""
import mmap, os, signal, snapengine, threading
buffer = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
buffer[:] = b"i" * len(buffer)
try:
    with snapengine.snapshot(buffer, {str(tmp_path / "image")!r}, rate_limit=1 << 18):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
except KeyboardInterrupt:
    buffer[0] = 1
    print("interrupted")
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.stdout.strip() == "interrupted", done.stderr
    assert not list(tmp_path.iterdir())


def test_dirty_logging_of_a_buffer(tmp_path):
    buffer = anonymous(16 * MIB)
    content = np.frombuffer(buffer, "u1")
    content[: 8 * MIB] = 1
    paused = threading.Event()
    running = threading.Event()
    stop = []

    def work():
        value = 2
        while not stop:
            if paused.is_set():
                running.clear()
                while paused.is_set():
                    time.sleep(0)
            running.set()
            content[: 2 * MIB : 64] = value % 200
            value += 1

    def pause():
        paused.set()
        while running.is_set() and thread.is_alive():
            time.sleep(0)

    thread = threading.Thread(target=work)
    thread.start()
    at_t = []
    target = snapengine.BufferTarget(
        buffer, pause=pause, resume=paused.clear, vmstate=lambda: at_t.append(content.tobytes()) or {}
    )
    try:
        result = snap(target, tmp_path / "image", method="dirty-logging", downtime_limit=PATIENCE_S)
    finally:
        stop.append(True)
        thread.join()
    assert result.status == "completed"
    assert result.rounds >= 2
    assert saved(tmp_path / "image") == at_t[0]
    assert result.hole_pages == 8 * MIB // PAGE


def test_dirty_logging_needs_a_pause(tmp_path):
    with pytest.raises(ValueError, match="pause"):
        snap(bytearray(MIB), tmp_path / "image", method="dirty-logging")
    assert not list(tmp_path.iterdir())


def test_dirty_logging_that_does_not_converge_is_a_result(tmp_path):
    buffer = anonymous(48 * MIB)
    content = np.frombuffer(buffer, "u1")
    content[:] = 1
    stop = []

    def work():
        while not stop:
            ctypes.memset(content.ctypes.data, 2, len(content))  # without the GIL

    thread = threading.Thread(target=work)
    thread.start()
    target = snapengine.BufferTarget(buffer, pause=lambda: None, resume=lambda: None)
    try:
        result = snap(
            target, tmp_path / "image", method="dirty-logging", max_rounds=3, rate_limit=96 * MIB,
            memory_limit=16 * MIB, downtime_limit=0.001,
        )  # fmt: skip
    finally:
        stop.append(True)
        thread.join()
    assert result.status == "not-converged"
    assert result.rounds == 3
    assert result.duplicate_pages > 0
    assert result.image_bytes > 48 * MIB
    assert not list(tmp_path.iterdir()), "an incomplete image is not an image"


def test_signal_handlers_run_on_the_callers_thread(tmp_path):
    """Capture threads block all signals: a handler that touched protected memory there would hang."""
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(threading.current_thread()))
    try:
        with snapengine.snapshot(bytearray(MIB), tmp_path / "image"):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [threading.main_thread()]
    finally:
        signal.signal(signal.SIGUSR1, before)
