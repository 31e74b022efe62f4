"""The image is exactly the state at T, proven on a guest that keeps writing and is never paused.

Each write of the guest contains its number and the numbers of the other threads that its thread had seen. So
the checker knows every byte that a consistent cut must hold. The negative control serves faults before T, so
a writer can write to memory that is not yet protected, and the checker must notice.
"""

import pytest
from gatekit import GatedFile
from patientkit import PeerTarget
from waitkit import PATIENCE_S, attempts, until

import snapengine
from snapengine.capture.capture import Capture
from snapengine.guest.image import check_image
from snapengine.guest.params import GuestParams
from snapengine.image import open_image
from snapengine.options import Options

MIB = 1 << 20
PAGE = 4096


class SoftTarget(PeerTarget):
    """A peer that is not paused at T: its threads run during the whole arming."""

    def open(self, features):
        opened = super().open(features)
        self.can_pause = False
        return opened


class EarlyCapture(Capture):
    _session_extra = {"serve_before_t": True, "arm_piece": 64 << 10}  # noqa: RUF012


class OlderKernelCapture(Capture):
    """As on Linux before 6.7: without PAGEMAP_SCAN, populated pages are found in /proc/PID/pagemap."""

    _session_extra = {"use_scan": False}  # noqa: RUF012


def snap(guest_socket, path, make=None, **options):
    target = SoftTarget(guest_socket, method="write-tracking")
    if make is None:
        capture = snapengine.snapshot(target, path, **options)
    else:
        capture = make(target, path, Options(**options), {})
    with capture:
        pass
    with open_image(path) as image:
        image.verify()
        return capture.result, check_image(image)


@pytest.mark.parametrize("arming", ["plain", "two-step"])
@pytest.mark.parametrize("pattern", ["uniform", "hot", "sequential"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("backing", "pages"), [("anon", "4k"), ("anon", "thp"), ("memfd", "4k")])
def test_soft_cut_is_consistent(guest, tmp_path, backing, pages, threads, pattern, arming):
    params = GuestParams(
        size=32 * MIB, backing=backing, pages=pages, threads=threads, pattern=pattern,
        hot_size=4 * MIB if pattern == "hot" else 0, zero_percent=10, hole_percent=10,
    )  # fmt: skip
    with guest(params) as socket:
        for _ in range(3):
            result, report = snap(socket, tmp_path / "image", arming=arming)
            assert report.consistent, report
            assert result.pages_saved + result.zero_pages + result.hole_pages == result.pages_total
            assert result.lost_pages == 0
            assert (result.pause_ns < result.arm_ns) == (arming == "two-step")
            assert result.duplicate_pages == 0


@pytest.mark.parametrize("arming", ["plain", "two-step"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("backing", ["anon", "memfd"])
def test_soft_cut_of_hugetlb_is_consistent(guest, tmp_path, hugetlb, backing, threads, arming):
    hugetlb(24)
    params = GuestParams(size=32 * MIB, backing=backing, pages="2m", threads=threads, hole_percent=25)
    with guest(params) as socket:
        for _ in range(3):
            result, report = snap(socket, tmp_path / "image", arming=arming)
            assert report.consistent, report
            assert result.pages_saved + result.zero_pages + result.hole_pages == result.pages_total


@pytest.mark.negative_control
def test_serving_faults_before_t_is_noticed(guest, tmp_path):
    params = GuestParams(size=32 * MIB, threads=1)
    with guest(params) as socket:
        for _ in attempts("the oracle accepts cuts with faults served before T"):
            _, report = snap(socket, tmp_path / "image", EarlyCapture)
            if not report.consistent:
                break


def test_with_a_spill_and_few_buffers(guest, tmp_path):
    params = GuestParams(size=64 * MIB, threads=3, incompressible=True)
    sink = GatedFile(tmp_path / "image")
    few = {"memory_limit": 16 * MIB, "spill_dir": str(tmp_path)}
    with guest(params) as socket:
        with snapengine.snapshot(SoftTarget(socket, method="write-tracking"), sink, **few) as capture:
            try:
                until(lambda: capture.progress().pages_done * PAGE > 2 * 16 * MIB, "no fault is served")
            finally:
                sink.gate.set()
        result = capture.result
        with open_image(tmp_path / "image") as image:
            image.verify()
            report = check_image(image)
    assert report.consistent, report
    assert result.spilled_bytes > 0
    assert result.peak_buffer_bytes <= 16 * MIB


@pytest.mark.parametrize("compress", ["zstd", "zstd:3"])
def test_compressed(guest, tmp_path, compress):
    params = GuestParams(size=32 * MIB, threads=3)
    with guest(params) as socket:
        result, report = snap(socket, tmp_path / "image", compress=compress)
    assert report.consistent, report
    assert result.image_bytes < result.nonzero_bytes / 2


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("backing", "pages"), [("anon", "4k"), ("anon", "thp"), ("memfd", "4k")])
def test_dirty_logging_is_consistent(guest, tmp_path, backing, pages, threads):
    params = GuestParams(
        size=32 * MIB, backing=backing, pages=pages, threads=threads, zero_percent=10, hole_percent=10
    )
    with guest(params, rate=20000) as socket:
        target = PeerTarget(socket, method="dirty-logging")
        generous = {"method": "dirty-logging", "downtime_limit": PATIENCE_S}
        with snapengine.snapshot(target, tmp_path / "image", **generous) as capture:
            pass
        result = capture.result
        with open_image(tmp_path / "image") as image:
            image.verify()
            report = check_image(image)
    assert result.status == "completed"
    assert report.consistent, report
    unique = result.pages_saved - result.duplicate_pages
    assert unique + result.zero_pages + result.hole_pages == result.pages_total
    assert result.rounds >= 2
    assert result.stop_ns > 0


@pytest.mark.parametrize("arming", ["plain", "two-step"])
@pytest.mark.parametrize(("backing", "pages"), [("anon", "4k"), ("anon", "thp"), ("memfd", "4k")])
def test_older_kernels(guest, tmp_path, backing, pages, arming):
    params = GuestParams(size=32 * MIB, backing=backing, pages=pages, threads=2, hole_percent=20)
    with guest(params) as socket:
        result, report = snap(socket, tmp_path / "image", OlderKernelCapture, arming=arming)
    assert report.consistent, report
    assert result.pages_saved + result.zero_pages + result.hole_pages == result.pages_total


def test_dirty_logging_on_an_older_kernel_says_what_it_needs(guest, tmp_path):
    options = Options(method="dirty-logging")
    with guest(GuestParams(size=MIB), rate=0) as socket:
        target = PeerTarget(socket, method="dirty-logging")
        with (
            pytest.raises(snapengine.UnsupportedError, match=r"Linux 6\.7"),
            OlderKernelCapture(target, tmp_path / "image", options, {}),
        ):
            pass
    assert not (tmp_path / "image").exists()
