"""Regression tests of concurrency: each case once hung or crashed a process, or made a wrong image."""

import ctypes
import mmap
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from gatekit import GatedFile
from waitkit import PATIENCE_S

import snapengine
from snapengine.image import open_image

MIB = 1 << 20
PAGE = 4096
MAP_HUGETLB = 0x40000
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
SLOW = {"memory_limit": 16 * MIB, "rate_limit": 48 * MIB}  # the walk waits for the sink
pytestmark = pytest.mark.usefixtures("requires_uffd")


def run(script, *arguments):
    """Run a script in a child process, which may hang; the lines that it printed."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def test_untouched_page_shared_by_two_buffers(tmp_path):
    view = memoryview(mmap.mmap(-1, 4 * PAGE, flags=PRIVATE))
    parts = {"a": view[: PAGE + 100], "b": view[PAGE + 100 : 3 * PAGE]}
    with snapengine.snapshot(parts, tmp_path / "image") as capture:
        view[PAGE] = view[2 * PAGE] = 1
    assert capture.result.pages_saved == 0
    with open_image(tmp_path / "image") as image:
        assert image.read("a", 0, PAGE + 100) == bytes(PAGE + 100)
        assert image.read("b", 0, 2 * PAGE - 100) == bytes(2 * PAGE - 100)


def test_a_child_runs_on_after_the_capture_though_a_sibling_lives():
    """The sibling inherits a copy of the first child's userfaultfd: closing ours releases nothing."""
    memory = mmap.mmap(-1, 48 * MIB)
    memory[:] = b"s" * len(memory)
    go, report = os.pipe(), os.pipe()
    children = []
    with snapengine.snapshot(memory, "null:", **SLOW):
        for number in range(2):
            child = os.fork()
            if child == 0:
                signal.alarm(int(2 * PATIENCE_S))
                if number == 0:
                    os.read(go[0], 1)
                    memory[-PAGE] = 1
                    os.write(report[1], b"w")
                signal.pause()
            children.append(child)
    os.write(go[1], b"g")
    ready = select.select([report[0]], [], [], PATIENCE_S)[0]
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for fd in (*go, *report):
        os.close(fd)
    assert ready, "the child waits for a fault that nothing serves"


def test_fork_with_a_full_descriptor_table():
    script = """
        import mmap, os, resource, snapengine
        memory = mmap.mmap(-1, 48 << 20)
        memory[:] = b"f" * len(memory)
        try:
            with snapengine.snapshot(memory, "null:", memory_limit=16 << 20, rate_limit=1 << 20):
                used = max(int(fd) for fd in os.listdir("/proc/self/fd"))
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, used + 2))
                held = []
                try:
                    while True:
                        held.append(os.open("/dev/null", 0))
                except OSError:
                    child = os.fork()
                    if child == 0:
                        os._exit(0)
                    os.waitpid(child, 0)
                    print("forked")
                    for fd in held:
                        os.close(fd)
        except snapengine.UffdError as error:
            print(error.errno)
    """
    assert run(script) == ["forked", "24"]


def test_forks_while_shared_pages_are_armed():
    """A fork whose event comes between the last protect and the release of a shared page."""
    shared = mmap.mmap(-1, 8 * MIB)
    shared[:] = b"s" * len(shared)
    view = memoryview(mmap.mmap(-1, 4 * PAGE, flags=PRIVATE))
    view[:] = b"x" * len(view)
    parts = {"shared": shared, "a": view[: PAGE // 2], "b": view[PAGE // 2 : 2 * PAGE]}
    stop = []

    def fork_all_the_time():
        while not stop:
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)

    thread = threading.Thread(target=fork_all_the_time)
    thread.start()
    statuses = []
    try:
        for _ in range(15):
            with snapengine.snapshot(parts, "null:") as capture:
                pass
            statuses.append(capture.result.status)
    finally:
        stop.append(True)
        thread.join()
    assert set(statuses) == {"completed"}


def test_hugetlb_buffer_that_begins_inside_a_huge_page(tmp_path, hugetlb):
    hugetlb(4)
    memory = mmap.mmap(-1, 8 * MIB, flags=PRIVATE | MAP_HUGETLB)
    memory[:] = b"A" * len(memory)
    inner = memoryview(memory)[MIB : 7 * MIB]
    filler = mmap.mmap(-1, 48 * MIB, flags=PRIVATE)
    filler[:] = b"f" * len(filler)
    buffers = {"filler": filler, "inner": inner}
    with snapengine.snapshot(buffers, tmp_path / "image", **SLOW) as capture:
        memory[MIB + PAGE] = memory[5] = memory[4 * MIB] = 66
    assert capture.result.lost_pages == 0
    with open_image(tmp_path / "image") as image:
        assert image.read("inner", 0, 6 * MIB) == b"A" * (6 * MIB)


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
@pytest.mark.parametrize(("begin", "end"), [(0, 7), (1, 2), (1, 4), (1, 5), (3, 8), (0, 8)])
def test_buffers_that_begin_or_end_inside_huge_pages(tmp_path, hugetlb, begin, end, method):
    """In the end whole huge pages must be released: the kernel refuses parts and releases nothing."""
    hugetlb(4)
    memory = mmap.mmap(-1, 8 * MIB, flags=PRIVATE | MAP_HUGETLB)
    memory[: end * MIB] = b"A" * end * MIB
    buffer = memoryview(memory)[begin * MIB : end * MIB]
    for name in ("first", "image"):
        target = snapengine.BufferTarget(buffer, pause=lambda: None, resume=lambda: None)
        with snapengine.snapshot(target, tmp_path / name, method=method):
            pass
        memory[begin * MIB] = memory[end * MIB - 1] = 65  # must not block: nothing serves faults any more
    with open_image(tmp_path / "image") as image:
        assert image.read(image.regions[0].name, 0, (end - begin) * MIB) == b"A" * (end - begin) * MIB


def test_two_buffers_in_one_huge_page_are_refused(tmp_path, hugetlb):
    hugetlb(2)
    memory = mmap.mmap(-1, 4 * MIB, flags=PRIVATE | MAP_HUGETLB)
    memory[:] = b"A" * len(memory)
    view = memoryview(memory)
    with (
        pytest.raises(ValueError, match="share a huge page"),
        snapengine.snapshot({"a": view[:MIB], "b": view[MIB:]}, tmp_path / "image"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_two_mappings_of_the_same_memory(tmp_path):
    fd = os.memfd_create("twice")
    os.ftruncate(fd, MIB)
    one, two = mmap.mmap(fd, MIB), mmap.mmap(fd, MIB)
    os.close(fd)
    one[:] = b"A" * MIB
    with (
        pytest.raises(snapengine.RegisterError, match="two mappings of the same memory"),
        snapengine.snapshot({"one": one, "two": two}, tmp_path / "image"),
    ):
        pass
    with snapengine.snapshot(one, tmp_path / "image") as capture:
        pass
    assert any("mapped a second time" in warning for warning in capture.result.warnings)


def test_a_resume_that_raises_leaves_nothing(tmp_path):
    memory = mmap.mmap(-1, 32 * MIB, flags=PRIVATE)
    memory[:] = b"r" * len(memory)

    def fail():
        raise OSError(5, "resume failed")

    for _ in range(5):
        target = snapengine.BufferTarget(memory, pause=lambda: None, resume=fail)
        with (
            pytest.raises(OSError, match="resume failed"),
            snapengine.snapshot(target, tmp_path / "image", **SLOW),
        ):
            pass
        memory[:PAGE] = bytes(PAGE)
    assert not list(tmp_path.iterdir())


def test_cancel_while_heap_pages_are_protected():
    """Joining threads frees memory, and free() writes to heap pages that are still protected."""
    script = """
        import snapengine
        big = bytearray(b"b" * (48 << 20))
        for _ in range(4):
            small = [bytearray(1400) for _ in range(3000)]
            del small[::2]
            buffers = {"big": big} | {f"s{i}": part for i, part in enumerate(small[:400])}
            capture = snapengine.snapshot(buffers, "null:", rate_limit=8 << 20, memory_limit=48 << 20,
                                          fault_threads=12)
            capture.start()
            capture.cancel()
            assert capture.wait(100)
        print("ended")
    """
    assert run(script) == ["ended"]


def test_exit_of_the_interpreter_during_a_capture(tmp_path):
    script = """
        import mmap, sys, snapengine
        memory = mmap.mmap(-1, 48 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = b"e" * len(memory)
        capture = snapengine.snapshot(memory, sys.argv[1], rate_limit=1 << 18)
        capture.start()
        print("exiting")
    """
    assert run(script, tmp_path / "image") == ["exiting"]
    assert not list(tmp_path.iterdir())


def test_an_encoder_without_memory_fails_the_capture(monkeypatch):
    """The other encoder must not wait for the turn of the failed one."""
    from snapengine.pipeline import encoder

    class Broken:
        def __init__(self, **_):
            self.calls = 0

        def compress(self, data):
            self.calls += 1
            if self.calls > 1:
                raise MemoryError("no memory for the compressor")
            return bytes(len(data))

    monkeypatch.setattr(encoder.zstandard, "ZstdCompressor", Broken)
    memory = mmap.mmap(-1, 32 * MIB, flags=PRIVATE)
    memory[:] = os.urandom(MIB) * 32
    with (
        pytest.raises(MemoryError, match="no memory for the compressor"),
        snapengine.snapshot(memory, "null:", compress="zstd"),
    ):
        pass
    memory[0] = 1


def test_a_file_mapped_over_a_part_of_the_target(tmp_path):
    """UFFDIO_UNREGISTER of the whole range then fails with EINVAL: the rest must be released nevertheless."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    file = tmp_path / "file"
    file.write_bytes(b"F" * MIB)
    memory = mmap.mmap(-1, 48 * MIB, flags=PRIVATE)
    memory[:] = b"m" * len(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    map_fixed = 0x10
    sink = GatedFile(tmp_path / "image")
    with snapengine.snapshot(memory, sink, memory_limit=16 * MIB) as capture:
        with open(file, "rb") as handle:
            got = libc.mmap(address + 40 * MIB, MIB, 3, mmap.MAP_PRIVATE | map_fixed, handle.fileno(), 0)
        sink.gate.set()
        assert got == address + 40 * MIB
    assert capture.result.lost_pages > 0
    for offset in range(0, len(memory), PAGE):
        memory[offset] = 1
    assert memory[0] == 1
