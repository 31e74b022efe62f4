"""Memory that is reserved but not used costs nothing: no memory, no time, no space in the image or the core.

Times are CPU times of a whole process, so a loaded machine changes them little. Their bounds are far above
the usual values, and far below the time that a cost per page or per 2 MiB would take.
"""

import mmap
import os
import statistics
import subprocess
import sys
import threading
import time

import pytest
from targetkit import COUNTERS, MEMORY, VALUES, Target, until

import snapengine
from snapengine.capture.capture import Capture
from snapengine.errors import CaptureCancelled
from snapengine.image import open_image
from snapengine.options import Options
from snapengine.process.target import ProcessTarget

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

PAGE, MIB, GIB, TIB = 4096, 1 << 20, 1 << 30, 1 << 40
MAP_NORESERVE = 0x4000
TOUCHED = 64 * PAGE  # targets/reserve.c: on command it writes at every multiple of this
MODES = {
    "soft": ({"cut": "soft"}, {"arming": "plain"}),
    "two-step": ({"cut": "soft"}, {"arming": "two-step"}),
    "stop": ({"cut": "stop"}, {}),
    "dirty": ({"method": "dirty-logging"}, {"method": "dirty-logging"}),
}
SPACES = [("private", 20 * TIB), ("memfd", 2 * TIB)]
# Dirty logging of shared memory needs a marker for each page of a hole: 2 MiB of page tables per GiB.
CASES = [(*space, mode) for space in SPACES for mode in MODES if mode != "dirty"]
CASES += [("private", 20 * TIB, "dirty"), ("memfd", 4 * GIB, "dirty")]

SAVE = """
import sys, snapengine
pid, path, cut = int(sys.argv[1]), sys.argv[2], sys.argv[3]
with snapengine.snapshot(snapengine.ProcessTarget(pid, cut=cut), path):
    pass
"""


def told(target, what):
    """Send the target a command, and wait until it is done."""
    target.words[VALUES] = what
    until(lambda: target.words[VALUES] == 0 or target.process.poll() is not None)
    assert target.process.poll() is None


def word(image, addr):
    return int.from_bytes(image.read_at(addr, 8), "little")


def check_marks(path, target, size):
    memory = target.words[MEMORY]
    with open_image(path) as image:
        report = image.verify()
        assert [word(image, memory + at) for at in (0, size // 2, size - PAGE)] == [1, 2, 3]
        assert image.read_at(memory + size // 4, MIB) == bytes(MIB)
        assert report.lost_pages == 0
    return report


@pytest.mark.parametrize(("kind", "size", "mode"), CASES)
def test_a_reservation_is_saved(tmp_path, kind, size, mode):
    path = tmp_path / "image"
    of_target, options = MODES[mode]
    with Target("reserve", "space", kind, size) as target:
        began = time.process_time()
        with snapengine.snapshot(ProcessTarget(target.pid, **of_target), path, **options) as capture:
            told(target, 1)  # it writes to holes and beside data of T
        spent = time.process_time() - began
        result = capture.result
        report = check_marks(path, target, size)
        target.check_running()
        if mode != "dirty":  # T of dirty logging is at the end
            with open_image(path) as image:
                assert word(image, target.words[MEMORY] + TOUCHED) == 0
    assert result.lost_pages == 0
    assert result.hole_pages >= size // PAGE - 40000
    assert result.pages_total == (
        result.pages_saved - result.duplicate_pages + result.zero_pages + result.hole_pages
    )
    assert result.hole_pages == report.hole_pages
    assert path.stat().st_size < 64 * MIB
    assert spent < 5


@pytest.mark.parametrize("cut", ["soft", "stop"])
@pytest.mark.parametrize(("kind", "size"), SPACES)
def test_what_the_engine_needs_follows_what_is_used(kind, size, cut):
    needed = {}
    for bytes_ in (16 * MIB, size):
        with Target("reserve", "space", kind, bytes_) as target:
            child = subprocess.Popen([sys.executable, "-c", SAVE, str(target.pid), "null:", cut])
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            assert child.returncode == 0
            needed[bytes_] = (usage.ru_maxrss << 10, usage.ru_utime + usage.ru_stime)
    (little, spent), (large, spent_large) = needed.values()
    assert large - little < 16 * MIB  # in addition to the needs of any capture
    assert spent_large - spent < 2


def reservation(size, flags):
    memory = mmap.mmap(-1, size, flags=flags | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for number, at in enumerate((0, size // 2, size - PAGE)):
        memory[at] = number + 1
    return memory


@pytest.mark.parametrize("arming", ["plain", "two-step"])
@pytest.mark.parametrize(("flags", "size"), [(mmap.MAP_PRIVATE, 4 * TIB), (mmap.MAP_SHARED, 256 * GIB)])
def test_a_reservation_of_this_process(tmp_path, flags, size, arming):
    memory = reservation(size, flags)
    began = time.process_time()
    with snapengine.snapshot(memory, tmp_path / "image", arming=arming) as capture:
        for at in range(TOUCHED, 64 * MIB, TOUCHED):
            memory[at] = 9
        memory[size // 2] = 8
    spent = time.process_time() - began
    with open_image(tmp_path / "image") as image:
        report = image.verify()
        found = [image.read(0, at, 1)[0] for at in (0, size // 2, size - PAGE, TOUCHED)]
    assert found == [1, 2, 3, 0]
    result = capture.result
    assert (result.lost_pages, result.pages_saved) == (0, 3)
    assert result.hole_pages == report.hole_pages
    assert result.pages_total == result.pages_saved + result.zero_pages + result.hole_pages
    assert spent < 5


class UnmapsFirst(ProcessTarget):
    """The target unmaps a part of its memory between the list of its regions and the first protection."""

    def __init__(self, target, **options):
        super().__init__(target.pid, **options)
        self.told = target

    def open(self, features):
        opened = super().open(features)
        told(self.told, 2)
        return opened


@pytest.mark.parametrize(("kind", "size"), [("private", 20 * TIB), ("memfd", 64 * GIB)])
@pytest.mark.parametrize("arming", ["plain", "two-step"])
def test_a_reservation_that_is_unmapped_in_the_middle(tmp_path, kind, size, arming):
    with Target("reserve", "space", kind, size) as target:
        began = time.process_time()
        with snapengine.snapshot(UnmapsFirst(target), tmp_path / "image", arming=arming) as capture:
            pass
        spent = time.process_time() - began
        check_marks(tmp_path / "image", target, size)
        target.check_running()
    assert capture.result.status == "completed"
    assert spent < 5


def test_this_process_unmaps_a_part_of_a_reservation(tmp_path):
    """During a capture: the discarded part is released, and so is the rest."""
    memory = reservation(4 * TIB, mmap.MAP_PRIVATE)
    began = time.process_time()
    with snapengine.snapshot(memory, tmp_path / "image", rate_limit=MIB):
        memory.madvise(mmap.MADV_DONTNEED, TIB, TIB)
        memory[TIB] = 1
    assert time.process_time() - began < 5
    with open_image(tmp_path / "image") as image:
        image.verify()
        assert image.read(0, TIB, 1) == b"\0"


@pytest.mark.parametrize(("kind", "size", "mode"), CASES)
def test_it_can_be_cancelled_at_any_time(kind, size, mode):
    """At many moments of arming and saving: after the cancellation almost no CPU time is used."""
    of_target, options = MODES[mode]
    costs = []
    with Target("reserve", "space", kind, size) as target:
        for step in range(12):
            capture = Capture(ProcessTarget(target.pid, **of_target), "null:", Options(**options), {})
            errors = []

            def run(capture=capture, errors=errors):
                try:
                    capture.start()
                    capture.wait()
                    assert capture.result is not None
                except CaptureCancelled as error:
                    errors.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            spent = time.process_time()
            until(lambda s=spent, n=step: time.process_time() - s > n * 0.002 or not thread.is_alive())  # noqa: B023
            capture.cancel()
            spent = time.process_time()
            thread.join()
            costs.append(time.process_time() - spent)
        target.check_running()
        before = target.words[COUNTERS]
        until(lambda: target.words[COUNTERS] > before, "it no longer runs")
    assert statistics.median(costs) < 0.1  # 19 ms at most on a quiet machine, 43 on one with a load of 6
