"""The first walker polls for faults itself: which thread serves, what is saved, and that no writer hangs."""

import mmap
import os
import threading

import pytest
from capturekit import anonymous, saved
from gatekit import GatedFile
from test_consistency import SoftTarget
from waitkit import attempts, until

import snapengine
from snapengine.capture.capture import Capture
from snapengine.guest.check import check_cut
from snapengine.guest.image import check_image
from snapengine.guest.memory import GuestMemory
from snapengine.guest.params import GuestParams
from snapengine.guest.writers import GuestWriters
from snapengine.image import open_image
from snapengine.options import Options

pytestmark = pytest.mark.usefixtures("requires_uffd")

MIB = 1 << 20
PAGE = 4096
SHARED = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS


class Watched(Capture):
    """Keeps the counters of its session."""

    pages = 32

    def __init__(self, *args):
        self._session_extra = {"poll_pages": self.pages}
        super().__init__(*args)

    def __exit__(self, *exc):
        try:
            return super().__exit__(*exc)
        finally:
            session = self._resources.session
            self.walk_faults, self.wakeups = session.walk_faults, session.poll_wakeups


def looking(pages):
    return type("Looking", (Watched,), {"pages": pages})


@pytest.mark.parametrize("pages", [1, 16, 32, 64])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("backing", ["anon", "memfd"])
def test_the_walker_serves_and_the_cut_is_consistent(guest, tmp_path, backing, threads, pages):
    params = GuestParams(
        size=48 * MIB, backing=backing, threads=threads, zero_percent=10, hole_percent=10, incompressible=True
    )
    with guest(params) as socket:
        for _ in attempts("the walker serves nothing"):
            target = SoftTarget(socket, method="write-tracking")
            with looking(pages)(target, tmp_path / "image", Options(), {}) as capture:
                pass
            with open_image(tmp_path / "image") as image:
                image.verify()
                report = check_image(image)
            assert report.consistent, report
            assert capture.result.lost_pages == 0
            assert sum(count for _, count in capture.result.fault_histogram) == capture.result.faults
            if capture.walk_faults:
                break


def test_it_can_be_left_to_the_fault_threads(guest, tmp_path):
    with guest(GuestParams(size=32 * MIB)) as socket:
        for _ in attempts("nobody faults"):
            target = SoftTarget(socket, method="write-tracking")
            with looking(0)(target, tmp_path / "image", Options(), {}) as capture:
                pass
            assert capture.walk_faults == 0
            if capture.result.faults:
                break


def test_a_slow_sink_leaves_the_faults_to_the_fault_threads(guest, tmp_path):
    """The walker waits for free buffers while all writers make progress: no writer waits with it."""
    options = Options(memory_limit=16 * MIB, spill_dir=str(tmp_path))
    sink = GatedFile(tmp_path / "image")
    with guest(GuestParams(size=64 * MIB, incompressible=True)) as socket:
        target = SoftTarget(socket, method="write-tracking")
        with looking(32)(target, sink, options, {}) as capture:
            try:
                until(lambda: capture.progress().pages_done * PAGE > 2 * options.memory_limit, "writers wait")
            finally:
                sink.gate.set()
    with open_image(tmp_path / "image") as image:
        assert check_image(image).consistent
    assert capture.result.faults > capture.walk_faults
    assert capture.result.spilled_bytes > 0


def test_a_walker_that_reads_discarded_memory_is_relieved(tmp_path):
    """The walker itself causes missing faults while the fault threads sleep: the watchdog wakes them."""
    for _ in attempts("the watchdog wakes no thread"):
        discarded = anonymous(64 * MIB)
        discarded[:] = b"\1" * len(discarded)
        params = GuestParams(size=64 * MIB, incompressible=True)
        with GuestMemory(params) as memory, GuestWriters(memory) as writers:
            writers.resume()
            target = snapengine.BufferTarget({"guest": memory, "discarded": discarded})
            with looking(32)(target, tmp_path / "image", Options(), {}) as capture:
                discarded.madvise(mmap.MADV_DONTNEED)
                before = writers.counts()
            until(lambda before=before: writers.counts() != before, "the writer makes no progress")
        result = capture.result
        assert result.status == "completed"
        with open_image(tmp_path / "image") as image:
            image.verify()
            found = {kind: length for _, length, kind in image.runs("discarded")}
            data = [(at, length) for at, length, kind in image.runs("discarded") if kind == "data"]
            assert all(image.read("discarded", at, 4096) == b"\1" * 4096 for at, _ in data)
            assert found.keys() <= {"data", "lost"}, "what was discarded must be lost, not zero"
        if capture.wakeups:
            break


def test_forks_while_it_looks(tmp_path):
    """The polling walker reads events: a fork returns, and the child's writes do not reach the image."""
    memory = anonymous(64 * MIB, SHARED)
    memory[:] = b"\1" * len(memory)
    stop = threading.Event()

    def write():
        page = 0
        while not stop.is_set():
            memory[page * 4096] = 2
            page = (page + 7919) % (len(memory) // 4096)

    writer = threading.Thread(target=write)
    statuses = []
    with looking(32)(snapengine.BufferTarget(memory), tmp_path / "image", Options(), {}) as capture:
        writer.start()
        for number in range(5):
            child = os.fork()
            if child == 0:
                for page in range(number, len(memory) // 4096, 16):
                    memory[page * 4096] = 3
                os._exit(0)
            statuses.append(os.waitpid(child, 0)[1])
    stop.set()
    writer.join()
    assert statuses == [0] * 5
    assert capture.result.lost_pages == 0
    assert saved(tmp_path / "image") == b"\1" * len(memory)


def cut_of_own_memory(path, arming, threads, make):
    """One capture of memory of this process, which native threads write to, and the verdict of the oracle."""
    params = GuestParams(size=32 * MIB, threads=threads, zero_percent=10, hole_percent=10)
    with GuestMemory(params) as memory, GuestWriters(memory) as writers:
        writers.resume()
        target = snapengine.BufferTarget({"ram": memory})
        with make(target, path, Options(arming=arming), {}) as capture:
            pass
    with open_image(path) as image, mmap.mmap(-1, params.size) as ram:
        image.verify()
        image.restore_into("ram", ram)
        return capture, check_cut(ram, params, None)


@pytest.mark.parametrize("arming", ["plain", "two-step"])
@pytest.mark.parametrize("threads", [1, 3])
def test_cuts_of_own_memory_are_consistent(tmp_path, threads, arming):
    for _ in attempts("the walker serves nothing"):
        capture, report = cut_of_own_memory(tmp_path / "image", arming, threads, Watched)
        assert report.consistent, report
        assert capture.result.lost_pages == 0
        if capture.walk_faults:
            break


@pytest.mark.negative_control
def test_serving_own_memory_before_t_is_noticed(tmp_path):
    """Negative control."""

    class Early(Capture):
        _session_extra = {"serve_before_t": True, "arm_piece": 64 << 10}  # noqa: RUF012

    for _ in attempts("the oracle accepts cuts with faults served before T"):
        _, report = cut_of_own_memory(tmp_path / "image", "plain", 1, Early)
        if not report.consistent:
            break
