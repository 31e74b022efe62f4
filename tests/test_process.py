"""An attached process: the image is a consistent cut, and the process has noticed nothing.

The target writes in a known order (targets/order.h), so every image must be a prefix of its writes. The
negative control serves faults before T, and the same check must notice.
"""

import contextlib
import os
import threading

import pytest
from gatekit import GatedFile
from orderkit import MIB, PAGE, STRIDES, OrderTarget, check_order, faults_of_order
from patientkit import ProcessTarget
from targetkit import COUNTERS, MEMORY, PAGES, Target, descriptors, status_line, until
from waitkit import PATIENCE_S, attempts

import snapengine
from snapengine.capture.capture import Capture
from snapengine.image import open_image
from snapengine.options import Options
from snapengine.process.record import process_of

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

CUTS = int(os.environ.get("ATTACH_CUTS", "1"))  # snapshots per case; `make soak` takes more
KINDS = ["anon", "thp", "memfd", "heap", pytest.param("hugetlb", marks=pytest.mark.host_optional)]
MODES = ["soft", "two-step", "stop", "dirty"]

SOFT = ("soft", "two-step")


class EarlyCapture(Capture):
    _session_extra = {"serve_before_t": True, "arm_piece": 64 << 10}  # noqa: RUF012


def attach(pid, mode, **options):
    """The target of a snapshot and the options for it; mode: soft (armed at once), two-step, stop or dirty
    (logging)."""
    if mode == "dirty":
        # On a loaded machine the rounds take long to get shorter; without convergence there is no image.
        options = {"max_rounds": 1000, "max_seconds": PATIENCE_S, "downtime_limit": 5.0} | options
        return ProcessTarget(pid, method="dirty-logging"), Options(method="dirty-logging", **options)
    if mode == "two-step":
        return ProcessTarget(pid, cut="soft"), Options(arming="two-step", **options)
    return ProcessTarget(pid, cut=mode), Options(arming="plain", **options)


def snap(pid, path, mode, **options):
    target, chosen = attach(pid, mode, **options)
    with snapengine.snapshot(target, path, chosen) as capture:
        pass
    assert capture.result.status == "completed"  # otherwise the file would be that of an earlier snapshot
    return capture.result


def check_untouched(target, descriptors_before):
    """The target runs, has lost no write, and has no descriptor or tracer of ours."""
    target.check_running(target.threads if isinstance(target, OrderTarget) else 1)
    assert descriptors(target.pid) == descriptors_before
    until(lambda: {status_line(tid, "TracerPid") for tid in target.tids} == {"0"}, "it is still traced")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_is_consistent(request, tmp_path, kind, threads, stride, mode):
    if kind == "hugetlb":
        request.getfixturevalue("hugetlb")(8)
    path = tmp_path / "image"
    with OrderTarget(kind, threads, stride) as target:
        before = descriptors(target.pid)
        for _ in range(CUTS):
            low = target.last_write()
            result = snap(target.pid, path, mode)
            check_order(path, target, low, target.last_write())
            assert result.status == "completed"
            assert result.lost_pages == 0
            assert result.cut == ("soft" if mode in SOFT else "stop")
            assert (result.stop_ns > 0) == (mode not in SOFT)
            assert result.injection_ns > 0
            assert result.pages_total == (
                result.pages_saved - result.duplicate_pages + result.zero_pages + result.hole_pages
            )
        check_untouched(target, before)
    path.unlink()


@pytest.mark.parametrize("mode", MODES)
def test_t_is_where_it_is_said_to_be(tmp_path, mode):
    """Write tracking: T is before the block is entered. Dirty logging: T is at the end."""
    with OrderTarget("anon", 1, 1) as target:
        chosen, options = attach(target.pid, mode)
        low = target.last_write()
        with snapengine.snapshot(chosen, tmp_path / "image", options):
            inside = target.last_write()
        newest = check_order(tmp_path / "image", target, low, target.last_write())
        assert newest >= inside if mode == "dirty" else newest <= inside + 1


@pytest.mark.negative_control
def test_faults_served_before_t_are_noticed(tmp_path):
    path = tmp_path / "image"
    with OrderTarget("anon", 1, 40503, 32 * MIB) as target:
        for _ in attempts("the oracle accepts cuts with faults served before T"):
            chosen = ProcessTarget(target.pid, target.region)
            with EarlyCapture(chosen, path, Options(), {}):
                pass
            with open_image(path) as image:
                memory = image.read_at(target.words[MEMORY], 32 * MIB)
            _, bad = faults_of_order(memory, target.stride)
            if len(bad):
                break
        target.check_running()


@pytest.mark.parametrize("mode", ["soft", "stop"])
def test_with_a_spill_and_few_buffers(tmp_path, mode):
    with OrderTarget("anon", 1, 40503, 32 * MIB) as target:
        sink = GatedFile(tmp_path / "image")
        chosen, options = attach(target.pid, mode, memory_limit=16 * MIB, spill_dir=str(tmp_path))
        with snapengine.snapshot(chosen, sink, options) as capture:
            try:
                until(lambda: capture.progress().pages_done * PAGE > 24 * MIB, "no fault is served")
            finally:
                sink.gate.set()
        check_order(tmp_path / "image", target)
        assert capture.result.spilled_bytes > 0
        target.check_running()


@pytest.mark.parametrize("mode", MODES)
def test_many_threads(tmp_path, mode):
    with Target("compute", 64) as target:
        before = descriptors(target.pid)
        result = snap(target.pid, tmp_path / "image", mode)
        assert result.lost_pages == 0
        with open_image(tmp_path / "image") as image:
            image.verify()
            assert len(process_of(image).threads) == (0 if mode in SOFT else 64)
            assert image.read_at(target.words[MEMORY] + 4000, 1) == b"\1"
            assert target.words[PAGES] == 256
        target.check_running(64)
        check_untouched(target, before)


@pytest.mark.parametrize("mode", MODES)
def test_a_wait_for_events_does_not_end_early(tmp_path, mode):
    with Target("blocking", "epoll_wait") as target:
        for _ in range(3):
            snap(target.pid, tmp_path / "image", mode)
        assert target.words[COUNTERS] == 0, "an EINTR was seen"
        assert target.words[COUNTERS + 64] == 0, "the call has returned"
        until(lambda: status_line(target.pid, "TracerPid") == "0", "it is still traced")
        assert target.process.poll() is None


def test_a_sink_that_does_not_read_keeps_no_thread_stopped():
    """The image's header is written after T of a stop cut: a full pipe delays only the capture."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write_end, bytes(4096))
        with Target("compute", 1) as target:
            capture = snapengine.snapshot(ProcessTarget(target.pid, cut="stop"), f"fd:{write_end}")
            errors = []

            def start():
                try:
                    capture.start()
                except snapengine.CaptureCancelled as error:
                    errors.append(error)

            starter = threading.Thread(target=start)
            starter.start()
            until(lambda: capture.progress().phase in ("saving", "writing"))
            target.check_running()
            until(lambda: status_line(target.pid, "TracerPid") == "0", "it is still traced")
            capture.cancel()
            starter.join(PATIENCE_S)
            assert len(errors) == 1
            target.check_running()
    finally:
        os.close(read_end)
        os.close(write_end)
