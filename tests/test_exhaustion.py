"""Descriptors, address space or disk space run out at any moment of a capture: there is one clear error, the
memory is released, and nothing is left behind. (For Ctrl-C see test_interrupts.py.)
"""

from __future__ import annotations

import subprocess

import pytest
from scarcekit import run

pytestmark = pytest.mark.usefixtures("requires_uffd")


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
    """A store to a hole then fails at any time of a capture, as it would without one: it never blocks."""
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
