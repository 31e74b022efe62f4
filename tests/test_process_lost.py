"""Memory that an attached process discards after T, before it was saved: it is reported as lost, and all
other memory is correct.

The sink waits at a gate, so the walk cannot reach that memory: the buffers are full before it.
"""

import os

import numpy as np
import pytest
from gatekit import GatedFile
from patientkit import ProcessTarget
from targetkit import COUNTERS, MEMORY, PAGES, VALUES, Target, until

import snapengine
from snapengine.errors import LostPagesError
from snapengine.image import open_image
from snapengine.image.encode import LOST
from snapengine.process.target import APPEARED

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

MIB = 1 << 20
PAGE = 4096
N_PAGES, FIRST, COUNT = 48 * MIB // PAGE, 40 * MIB // PAGE, 1024
# targets/victim.c
UNMAP, REPLACE, DISCARD, PUNCH, TRUNCATE, MOVE, GROW, MAP_A_FILE, REWRITE, REMOVE = range(1, 11)
WRITE, MAP_AGAIN, EXTEND = 11, 12, 13


class Victim(Target):
    """``with Victim(kind) as target``: memory of known content."""

    def __init__(self, kind):
        self.kind = kind
        super().__init__("victim", kind, N_PAGES)

    @property
    def region(self):
        start = self.words[MEMORY]
        return f"{start:x}-{start + self.words[PAGES] * PAGE:x}"

    def act(self, deed, first=FIRST, count=COUNT):
        """Have the target do `deed` to the pages first ... first + count, and wait until it is done."""
        self.words[5], self.words[6] = first, count
        self.words[VALUES] = deed
        until(lambda: self.words[VALUES] == 0, "it did not act")

    def check_running(self, n=1):
        super().check_running(n)
        assert self.words[COUNTERS] > 0


def save(target, path, deed, cut="soft", regions=None, **options):
    """A snapshot during which the target does `deed`, while its pages are saved."""
    sink = GatedFile(path)
    chosen = ProcessTarget(target.pid, regions or target.region, cut=cut)
    with snapengine.snapshot(chosen, sink, memory_limit=16 * MIB, **options) as capture:
        try:
            until(lambda: capture.progress().pages_done >= 256, "the walk does not begin")
            target.act(deed)
        finally:
            sink.gate.set()
    return capture.result


def lost_pages(result, target):
    """Numbers of the lost pages of the memory."""
    start = target.words[MEMORY]
    found = set()
    for addr, length in result.lost_runs:
        found.update(range((addr - start) // PAGE, (addr + length - start) // PAGE))
    return found


def check_content(path, target, lost):
    """Each page that is not lost has its content of T, and no lost page can be read."""
    start = target.words[MEMORY]
    with open_image(path) as image:
        image.verify()
        region = next(r for r in image.regions if r.addr <= start < r.addr + r.length)
        runs = image.resolve(region, start - region.addr, N_PAGES * PAGE)
        assert sum(pages for _, pages, kind in runs if kind == LOST) == len(lost)
        page = 0
        while page < N_PAGES:
            if page in lost:
                with pytest.raises(LostPagesError):
                    image.read_at(start + page * PAGE, PAGE)
                page += 64
                continue
            end = min([n for n in lost if n > page], default=N_PAGES)
            words = np.frombuffer(image.read_at(start + page * PAGE, (end - page) * PAGE), "<u8").reshape(
                -1, 512
            )
            wanted = np.arange(page + 1, end + 1)
            if target.kind in ("memfd", "hugetlb") and page == 0:
                wanted[:16] = 0
            wrong = np.flatnonzero((words[:, 0] != wanted) | (words[:, 511] != wanted)) + page
            assert not len(wrong), f"{len(wrong)} pages are wrong, but not reported as lost: {wrong[:5]}"
            page = end


WAYS = [
    ("anon", UNMAP), ("anon", REPLACE), ("anon", DISCARD), ("anon", MOVE), ("anon", MAP_A_FILE),
    ("memfd", REPLACE), ("memfd", PUNCH), ("memfd", TRUNCATE), ("memfd", REWRITE), ("memfd", REMOVE),
    ("memfd", MOVE), ("private", DISCARD), ("private", UNMAP), ("private", REPLACE), ("private", MOVE),
]  # fmt: skip


@pytest.mark.parametrize("cut", ["soft", "stop"])
@pytest.mark.parametrize(("kind", "deed"), WAYS)
def test_lost_memory_is_reported(tmp_path, kind, deed, cut):
    with Victim(kind) as target:
        result = save(target, tmp_path / "image", deed, cut)
        lost = lost_pages(result, target)
        end = N_PAGES if deed == TRUNCATE else FIRST + COUNT
        if deed == REWRITE:  # page by page: pages that a fault includes are saved before they are punched
            assert lost <= set(range(FIRST, end))
            assert FIRST in lost
        else:
            assert lost == set(range(FIRST, end))
        assert result.lost_pages == len(lost)
        check_content(tmp_path / "image", target, lost)
        target.check_running()


@pytest.mark.host_optional
@pytest.mark.parametrize("cut", ["soft", "stop"])
@pytest.mark.parametrize("deed", [PUNCH, REWRITE, REMOVE, TRUNCATE, MOVE])
def test_lost_huge_pages_are_reported(tmp_path, hugetlb, deed, cut):
    """hugetlb files have no changing timestamps, no SEEK_DATA, and the old size once they are written to."""
    hugetlb(N_PAGES // 512 + 2)
    test_lost_memory_is_reported(tmp_path, "hugetlb", deed, cut)


@pytest.mark.parametrize("deed", [UNMAP, DISCARD])
def test_shared_memory_goes_on_in_its_file(tmp_path, deed):
    """It is unmapped, or none of its pages is mapped any more: its content of T is saved, with zero pages."""
    with Victim("memfd") as target:
        result = save(target, tmp_path / "image", deed)
        assert result.lost_pages == 0
        check_content(tmp_path / "image", target, lost_pages(result, target))
        target.check_running()


def test_a_mapping_made_after_t_is_a_warning(tmp_path):
    with Victim("memfd") as target:
        result = save(target, tmp_path / "image", MAP_AGAIN)
        (warning,) = [text for text in result.warnings if "was mapped again" in text]
        assert "victim" in warning
        quiet = save(target, tmp_path / "quiet", UNMAP)
        assert not any("was mapped again" in text for text in quiet.warnings)
        target.check_running()


@pytest.mark.parametrize("kind", ["memfd", "private"])
def test_what_no_page_tells_is_a_warning(tmp_path, kind):
    """A write() to the memory's file after T is in the image, and no page is reported as lost."""
    with Victim(kind) as target:
        result = save(target, tmp_path / "image", WRITE)
        words = ("through its file", "writes to the file after T")
        assert any(word in text for word in words for text in result.warnings)
        assert result.lost_pages == 0
        target.check_running()


def test_memory_is_not_split(tmp_path):
    """mremap() of the whole mapping during the walk: the capture must not make it fail."""
    with Victim("anon") as target:
        start = target.words[MEMORY]
        hidden = 16 * PAGE
        save(target, tmp_path / "image", GROW, regions=f"{start + hidden:x}-{start + N_PAGES * PAGE:x}")
        target.check_running()


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
def test_memory_that_has_grown_is_not_split(tmp_path, method):
    """The memory grows after its mappings were listed, before they are registered. If only its old range were
    registered, it would become two mappings, and a later mremap() of the whole would fail."""

    class GrowsLate(ProcessTarget):
        def open(self, features):
            opened = super().open(features)
            target.act(EXTEND)
            return opened

    with Victim("anon") as target:
        start = target.words[MEMORY]
        readable = f"{start + 16 * PAGE:x}-{start + N_PAGES * PAGE:x}"
        chosen = GrowsLate(target.pid, readable, method=method)
        sink = GatedFile(tmp_path / "image")
        with snapengine.snapshot(chosen, sink, memory_limit=16 * MIB, method=method) as capture:
            try:
                until(lambda: capture.progress().pages_done >= 256, "the walk does not begin")
                target.act(GROW)
            finally:
                sink.gate.set()
        if method == "write-tracking":
            ends = [item["end"] for item in capture.result.not_captured if item["reason"] == APPEARED]
            assert start + (N_PAGES + 256) * PAGE in ends
        target.check_running()


@pytest.mark.parametrize(("kind", "deed"), [("anon", UNMAP), ("memfd", PUNCH)])
def test_strict(tmp_path, kind, deed):
    with Victim(kind) as target:
        with pytest.raises(LostPagesError, match=f"{COUNT} pages were discarded"):
            save(target, tmp_path / "image", deed, strict=True)
        assert os.listdir(tmp_path) == []
        target.check_running()


@pytest.mark.parametrize("cut", ["soft", "stop"])
def test_memory_that_may_not_be_read(tmp_path, cut):
    with Victim("anon") as target:
        target_cut = ProcessTarget(target.pid, cut=cut)
        with snapengine.snapshot(target_cut, tmp_path / "image") as capture:
            pass
        assert capture.result.lost_pages == 0
        check_content(tmp_path / "image", target, set())
        target.check_running()
