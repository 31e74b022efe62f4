"""Descriptors, address space or disk run out, or a Ctrl-C comes, at any moment of a capture: one clear error,
the memory is released, and nothing is left behind.

Each runs in a child: a limit that is hit in the test process would hit the test.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.usefixtures("requires_uffd")
COMMON = r"""
    import contextlib, errno, io, mmap, os, random, re, resource, signal, sys, threading, time
    import snapengine
    from snapengine.errors import SinkError, SnapengineError
    from snapengine.image import open_image

    MIB = 1 << 20
    draw = random.Random(int(sys.argv[2]))
    folder = sys.argv[1]
    buffer = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(8 * MIB))

    def capture(method="write-tracking", sink=os.path.join(folder, "image"), **how):
        target = snapengine.BufferTarget({"ram": buffer}, pause=lambda: None, resume=lambda: None)
        with snapengine.snapshot(target, sink, method=method, **how):
            buffer[0] = 1

    def open_files():
        found = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):    # the one of this list
                found.append((number, os.readlink(f"/proc/self/fd/{number}")))
        # Python's own tempfile loses its unnamed file if the Ctrl-C comes as open() returns.
        return sorted(pair for pair in found if not re.fullmatch(r".*/#\d+ \(deleted\)", pair[1]))

    def check(before):
        for start in range(0, 8 * MIB, 4096):
            buffer[start] = 7                       # it would stand for ever
        for _ in range(200):                        # a joined thread has its last instructions
            if len(os.listdir("/proc/self/task")) == 1:
                break
            time.sleep(0.01)
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
        assert len(os.listdir("/proc/self/task")) == 1
        assert open_files() == before, (open_files(), before)
        left = set(os.listdir(folder))
        if "image" in left:
            with open_image(os.path.join(folder, "image")) as image:
                image.verify()
            os.unlink(os.path.join(folder, "image"))
        assert left <= {"image"}, left

    capture(sink="null:")                           # all is imported, and it works
    before = open_files()
    check(before)
"""


def run(script: str, folder, seed: int = 0, **how) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMON) + textwrap.dedent(script), str(folder), str(seed)],
        capture_output=True, text=True, check=False, timeout=100, **how,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-3000:])
    return done.stdout


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
def test_descriptors(method, tmp_path):
    out = run(
        f"""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        outcomes = set()
        for free in range(0, 40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + free, hard))
            try:
                capture({method!r})
                outcomes.add("saved")
            except (SnapengineError, OSError) as error:
                assert error.errno in (errno.EMFILE, errno.ENFILE), repr(error)
                outcomes.add("refused")
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            check(before)
        print(sorted(outcomes))
        """,
        tmp_path,
    )
    assert out == "['refused', 'saved']\n"


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
def test_address_space(method, tmp_path):
    out = run(
        f"""
        outcomes = set()
        for more in range(0, 400, 8):
            used = int(open("/proc/self/statm").read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (used + more * MIB, resource.RLIM_INFINITY))
            try:
                capture({method!r}, memory_limit=16 * MIB, encoder_threads=2)
                outcomes.add("saved")
            except (SnapengineError, OSError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError):
                    assert "can't start new thread" in str(error), repr(error)
                if isinstance(error, OSError):
                    assert error.errno in (errno.ENOMEM, errno.EAGAIN), repr(error)
                outcomes.add("refused")
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            check(before)
        print(sorted(outcomes))
        """,
        tmp_path,
    )
    assert out == "['refused', 'saved']\n"


def test_size_of_a_file(tmp_path):
    out = run(
        """
        for limit in (0, 1, 64, 4096, 3 * MIB, 8 * MIB):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                capture()
            except SinkError as error:
                assert error.errno == errno.EFBIG
                print("refused")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            check(before)
        """,
        tmp_path,
    )
    assert out == "refused\n" * 6


@pytest.fixture
def small_disk(as_root, tmp_path):
    """A file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.decode()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.host_optional
def test_a_full_disk(small_disk):
    out = run(
        """
        for method in ("write-tracking", "dirty-logging"):
            for compress in ("none", "zstd", "zstd:auto"):
                try:
                    capture(method, compress=compress)
                except SinkError as error:
                    assert error.errno == errno.ENOSPC
                    print("refused")
                check(before)
        """,
        small_disk,
    )
    assert out == "refused\n" * 6


@pytest.mark.host_optional
@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
def test_a_full_disk_under_shared_memory(small_disk, method, tmp_path):
    """A store to a hole fails then, as it would without a capture, at any time of one: it does not stand."""
    out = run(
        f"""
        zeros = open("/dev/zero", "rb")
        file = open(os.path.join(folder, "memory"), "w+b")
        file.truncate(8 * MIB)
        buffer = mmap.mmap(file.fileno(), 8 * MIB)
        buffer[: 2 * MIB] = os.urandom(2 * MIB)
        kept = buffer[: 2 * MIB]
        filler = open(os.path.join(folder, "filler"), "wb", buffering=0)
        with contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        outcomes = []

        def store(page):
            try:
                outcomes.append(os.preadv(zeros.fileno(), [memoryview(buffer)[page * 4096 :][:4096]], 0))
            except OSError as error:
                outcomes.append(error.errno)

        def store_some():
            for page in range(600, 640):
                store(page)

        at_any_time = threading.Thread(target=store_some)
        image = {str(tmp_path / "image")!r}
        target = snapengine.BufferTarget(buffer, pause=lambda: store(700), resume=lambda: store(701))
        at_any_time.start()
        with snapengine.snapshot(target, image, method={method!r}, rate_limit=8 * MIB):
            store(702)
        at_any_time.join()
        assert set(outcomes) == {{errno.EFAULT}}, outcomes
        filler.truncate(0)
        store(703)
        assert outcomes.pop() == 4096
        with open_image(image) as image:
            assert image.read(0, 0, 2 * MIB) == kept
            assert image.read(0, 2 * MIB, 6 * MIB) == bytes(6 * MIB)
        print(len(outcomes))
        """,
        small_disk,
    )
    assert out == "43\n"


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
@pytest.mark.parametrize("seed", range(2))
def test_an_interrupt_at_any_moment(method, seed, tmp_path):
    out = run(
        f"""
        outcomes = set()
        longest = 0.02
        for _ in range(40):
            began = time.monotonic()
            try:
                signal.signal(signal.SIGALRM, signal.default_int_handler)
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0002, longest))
                capture({method!r}, rate_limit=draw.choice((0, 200 * MIB)))
                outcomes.add("saved")
            except KeyboardInterrupt:
                outcomes.add("interrupted")
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            longest = max(0.02, min(0.3, 1.2 * (time.monotonic() - began)))
            check(before)
        print(sorted(outcomes))
        """,
        tmp_path,
        seed,
    )
    assert "interrupted" in out
