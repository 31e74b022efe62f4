"""No failure of the engine hangs or harms the target: after SIGKILL at random moments the guest runs."""

import mmap
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from patientkit import PeerTarget
from waitkit import until

import snapengine
from snapengine.guest.image import check_image
from snapengine.guest.params import GuestParams
from snapengine.guest.process import GuestProcess
from snapengine.image import open_image

MIB = 1 << 20
ENGINE = """
import sys, snapengine
from snapengine.handover.peer import PeerTarget
socket, path, method = sys.argv[1:]
target = PeerTarget(socket, timeout=100, step_timeout=100, method=method)
print("ready", flush=True)
with snapengine.snapshot(target, path, method=method, memory_limit=16 << 20, rate_limit=150 << 20):
    print("armed", flush=True)
"""
pytestmark = pytest.mark.usefixtures("requires_uffd")


def start_engine(socket, path, method):
    return subprocess.Popen(
        [sys.executable, "-c", ENGINE, str(socket), str(path), method], stdout=subprocess.PIPE, text=True
    )


def check_running(guest):
    """Every writer of the guest completes another write."""
    before = guest.stats()["writes"]

    def all_moved():
        return all(after > then for after, then in zip(guest.stats()["writes"], before, strict=True))

    until(all_moved, "a writer makes no progress")


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
@pytest.mark.parametrize(("backing", "pages"), [("anon", "4k"), ("anon", "thp"), ("memfd", "4k")])
def test_killed_engine(tmp_path, backing, pages, method):
    moments = random.Random(f"{backing}{pages}{method}")
    params = GuestParams(size=48 * MIB, backing=backing, pages=pages, threads=2, hole_percent=10)
    rate = None if method == "write-tracking" else 50_000
    with GuestProcess(tmp_path / "socket", params, rate) as guest:
        for turn in range(5):
            engine = start_engine(tmp_path / "socket", tmp_path / "image", method)
            with engine:
                line = "ready" if turn % 2 else "armed"
                while engine.stdout.readline().strip() not in (line, ""):
                    pass
                delay = time.monotonic() + moments.uniform(0, 0.08 if line == "ready" else 0.25)
                while time.monotonic() < delay and engine.poll() is None:
                    pass
                engine.send_signal(signal.SIGKILL)
            check_running(guest)
            if (tmp_path / "image").exists():  # complete, although the engine may have been killed just then
                with open_image(tmp_path / "image") as image:
                    image.verify()
        with snapengine.snapshot(PeerTarget(tmp_path / "socket"), tmp_path / "image"):
            pass
        check_running(guest)
    with open_image(tmp_path / "image") as image:
        image.verify()
        report = check_image(image)
    assert report.consistent, report


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
def test_cancelled_engine(tmp_path, method):
    with GuestProcess(tmp_path / "socket", GuestParams(size=48 * MIB, threads=2), 50_000) as guest:
        for _ in range(5):
            target = PeerTarget(tmp_path / "socket", method=method)
            with (
                pytest.raises(snapengine.CaptureCancelled),
                snapengine.snapshot(target, tmp_path / "image", method=method, rate_limit=MIB) as capture,
            ):
                capture.cancel()
            check_running(guest)
        until(lambda: guest.stats()["ended"] == {"cancelled": 5})
    assert not (tmp_path / "image").exists()


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
@pytest.mark.parametrize("backing", ["anon", "memfd"])
def test_target_that_dies(tmp_path, backing, method):
    params = GuestParams(size=48 * MIB, backing=backing, threads=2)
    with GuestProcess(tmp_path / "socket", params, 50_000) as guest:
        target = PeerTarget(tmp_path / "socket", method=method)
        with (
            pytest.raises(snapengine.TargetGoneError, match=str(guest.pid)),
            snapengine.snapshot(
                target, tmp_path / "image", method=method, memory_limit=16 * MIB, rate_limit=8 * MIB
            ),
        ):
            guest.kill()
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("write-tracking", "writer_and_encoder"),
        ("dirty-logging", "writer_and_encoder"),
        ("write-tracking", "Plan"),
    ],
)
def test_target_that_dies_before_it_is_armed(tmp_path, monkeypatch, method, step):
    """UFFDIO_REGISTER fails with ENOMEM, not ESRCH, once the memory of the target is gone."""
    with GuestProcess(tmp_path / "socket", GuestParams(size=8 * MIB)) as guest:
        real = getattr(snapengine.capture.setup, step)

        def dies_first(*args, **fields):
            guest.kill()
            return real(*args, **fields)

        monkeypatch.setattr(snapengine.capture.setup, step, dies_first)
        target = PeerTarget(tmp_path / "socket", method=method)
        with (
            pytest.raises(snapengine.TargetGoneError, match=str(guest.pid)),
            snapengine.snapshot(target, tmp_path / "image", method=method),
        ):
            pass
    assert [path.name for path in tmp_path.iterdir()] == []


def test_encoders_end_before_their_pool_is_freed(tmp_path):
    """A pause that fails ends dirty logging while chunks are still being written to a slow sink."""

    class Fails(snapengine.BufferTarget):
        def pause(self):
            raise RuntimeError("this target does not pause")

    buffer = mmap.mmap(-1, 24 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(24 * MIB))
    options = {"method": "dirty-logging", "rate_limit": MIB, "downtime_limit": 100.0}
    target = Fails(buffer, pause=lambda: None, resume=lambda: None)
    with (
        pytest.raises(RuntimeError, match="does not pause"),
        snapengine.snapshot(target, tmp_path / "image", **options) as capture,
    ):
        assert capture._encoders.working
    assert not capture._encoders.working
    assert list(tmp_path.iterdir()) == []
