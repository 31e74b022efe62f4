"""Shared memory: exactly the pages that were discarded after T are lost.

The cases: zero pages, pages whose neighbours are written to, holes that are filled, memory that is punched
out, truncated and filled again; for each way to capture and each kind of memory. The sink waits at a gate.
The memory is changed after T and before its pages are saved (write tracking), or after they are copied and
before T (dirty logging).
"""

import contextlib
import functools
import mmap
import os
import subprocess
import threading

import numpy as np
import pytest
from sharekit import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    HOLES,
    KINDS,
    LATER,
    LIBC,
    MIB,
    N_PAGES,
    PAGE,
    Child,
    Share,
    expected,
)  # fmt: skip
from targetkit import until
from test_process_lost import GatedFile

import snapengine
from snapengine.errors import LostPagesError
from snapengine.handover.peer import PeerTarget
from snapengine.image import open_image
from snapengine.process.target import ProcessTarget

pytestmark = pytest.mark.usefixtures("requires_uffd")

EARLY, LATE, COUNT = 512, HOLES - 1536, 1024
TRACKING, ROUNDS = "write-tracking", "dirty-logging"
TAKES = ["punch", "look", "rewrite", "regrow"]
KEEPS = ["nothing", "allocate", "fill", "read_holes"]
AFTER = {"punch": 0, "look": 0, "rewrite": LATER, "regrow": LATER}  # then in the changed pages


@pytest.fixture
def place(request, tmp_path):
    """``place(kind)``: a directory for the file, with everything that this kind needs."""
    mounted = []

    def prepare(kind):
        if kind == "hugetlb":
            request.getfixturevalue("hugetlb")(2 * N_PAGES // 512 + 2)
        directory = tmp_path / "files"
        directory.mkdir()
        if kind == "tmpfs":
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
            mounted.append(directory)
        return directory

    yield prepare
    for directory in mounted:
        subprocess.run(["umount", "-l", directory], check=True)


class Own(Share):
    """The memory of this process."""

    def act(self, deed, first, count):
        getattr(self, deed)(first, count)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.words = None
        if self.fd >= 0:
            os.close(self.fd)  # an open descriptor keeps the memory, and there are few huge pages


@contextlib.contextmanager
def opened(way, method, kind, directory, tmp_path):
    """(memory, target)."""
    if way == "own":
        with Own(kind, directory) as share:
            yield share, snapengine.BufferTarget(share.memory, pause=lambda: None, resume=lambda: None)
    elif way == "peer":
        with Child(kind, directory, tmp_path / "socket") as child:
            yield child, PeerTarget(tmp_path / "socket", method=method)
    else:
        with Child(kind, directory) as child:
            chosen = f"{child.addr:x}-{child.addr + N_PAGES * PAGE:x}"
            yield child, ProcessTarget(child.pid, chosen, method=method, cut=way, deadline=30.0)


def capture(memory, target, path, method, deed, first):
    sink = GatedFile(path)
    if method == ROUNDS:  # a truncated file is soon copied, but T must come after the change
        pause = target.pause
        target.pause = lambda: (sink.gate.wait(60), pause())
    options = {"max_rounds": 1000, "downtime_limit": 5.0} if method == ROUNDS else {}
    # A write to a mapping of a file that is truncated at that moment raises SIGBUS.
    with memory.written(first, N_PAGES if deed == "regrow" else COUNT):
        session = snapengine.snapshot(target, sink, memory_limit=16 * MIB, method=method, **options)
        with session as running:
            try:
                wanted = first + COUNT if method == ROUNDS else 64
                until(lambda: running.progress().pages_done >= wanted, "the walk does not begin")
                memory.act(deed, first, COUNT)
            finally:
                sink.gate.set()
    return running.result


def read(path, addr):
    """Words 0 and 511 of each page, and the lost pages."""
    found = np.zeros((N_PAGES, 2), np.uint64)
    lost = set()
    with open_image(path) as image:
        image.verify()
        pieces = [(page, 256) for page in range(0, N_PAGES, 256)]
        for page, n in pieces:
            try:
                words = np.frombuffer(image.read_at(addr + page * PAGE, n * PAGE), "<u8").reshape(n, 512)
            except LostPagesError:
                if n == 1:
                    lost.add(page)
                else:
                    pieces.extend((page + i, 1) for i in range(n))
            else:
                found[page : page + n] = words[:, [0, 511]]
    return found, lost


WAYS = [("soft", TRACKING), ("stop", ROUNDS), ("stop", TRACKING), ("own", TRACKING), ("own", ROUNDS),
        ("peer", TRACKING), ("peer", ROUNDS)]  # fmt: skip


def matrix():
    """All kinds and deeds for the first two ways; the others mostly share their code."""
    for way, method in WAYS:
        for kind in KINDS:
            for deed in KEEPS + TAKES:
                if kind == "anonymous" and deed in ("allocate", "regrow"):
                    continue  # it has no descriptor
                if way == "own" and deed == "regrow":
                    continue  # a process that truncates a file which it has mapped gets SIGBUS
                few = kind in ("memfd", "hugetlb") and deed in ("nothing", "fill", "punch", "rewrite")
                if few or (way, method) in WAYS[:2]:
                    marks = [pytest.mark.host_optional] if kind == "hugetlb" else []
                    yield pytest.param(kind, deed, way, method, marks=marks)


@pytest.mark.parametrize(("kind", "deed", "way", "method"), list(matrix()))
def test_lost_is_what_was_taken_away(tmp_path, place, kind, deed, way, method):
    first = EARLY if method == ROUNDS else LATE
    with opened(way, method, kind, place(kind), tmp_path) as (memory, target):
        result = capture(memory, target, tmp_path / "image", method, deed, first)
        found, lost = read(tmp_path / "image", memory.addr)
        unit = 512 if kind == "hugetlb" else 1
    wanted = np.repeat(expected(unit)[:, None], 2, axis=1)
    touched = set(range(first, N_PAGES if deed == "regrow" else first + COUNT)) if deed in TAKES else set()
    if method == ROUNDS:  # T is after the change
        wanted[sorted(touched)] = 0
        wanted[first : first + COUNT] = AFTER.get(deed, wanted[first : first + COUNT])
        if deed == "fill":
            wanted[HOLES:, 0] = LATER
        touched = set()
    assert lost <= touched
    assert result.lost_pages == len(lost)
    right = (found == wanted).all(axis=1)
    right[sorted(lost)] = True
    assert right.all(), f"pages that are wrong, but not reported as lost: {np.flatnonzero(~right)[:8]}"
    if touched:
        assert lost, "the memory was saved before it was changed: the test proves nothing"


BODY, FLOOD, TAIL = 8192, 16384, 98304  # pages: data, holes that fill, zero pages that take time to check


def flood(words, stop, filled):
    """Fill the holes in order: a state that holds page n also holds all pages before it.

    `filled` gets the numbers of the filled pages.
    """
    with contextlib.suppress(PermissionError):  # so that it also runs before T on a loaded machine
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -15)
    for page in range(BODY, BODY + FLOOD):
        if stop.is_set():
            return
        words[page, [0, 511]] = page
        filled.append(page)


def test_a_hole_that_fills_as_t_comes_exists_at_t(tmp_path):
    """Every other page that was just filled is punched out after T, and touched again: it is lost, not a
    hole. The other pages tell when T was."""
    size = (BODY + FLOOD + TAIL) * PAGE
    stop = threading.Event()
    file = os.memfd_create("flood")
    os.ftruncate(file, size)
    memory = mmap.mmap(file, size)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    words = np.frombuffer(memory, "<u8").reshape(-1, 512)
    words[:BODY, 0] = 1
    words[BODY + FLOOD :, 0] = 0
    filled = []
    writer = threading.Thread(target=flood, args=(words, stop, filled))

    def pause():
        writer.start()
        until(lambda: len(filled) > 64, "no page is filled")

    target = snapengine.BufferTarget(memory, pause=pause, resume=lambda: None)
    sink = GatedFile(tmp_path / "image")
    try:
        options = {"memory_limit": 16 * MIB, "arming": "two-step", "walk_threads": 1}
        with snapengine.snapshot(target, sink, **options):
            stop.set()
            writer.join()
            # No look at the memory for this: 16384 faults, and meanwhile the walk would save these pages.
            for page in filled[1::2]:
                assert not LIBC.fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE, PAGE)
                words[page, 0] = LATER
            sink.gate.set()
    finally:
        stop.set()
        sink.gate.set()
        os.close(file)
    lost, found = set(), {}
    with open_image(tmp_path / "image") as image:
        for page in filled:
            try:
                found[page] = int.from_bytes(image.read_at(words.ctypes.data + page * PAGE, 8), "little")
            except LostPagesError:
                lost.add(page)
    last = max(page for page in filled[::2] if found.get(page))
    assert [page for page in range(BODY, last) if page not in lost and found[page] != page] == []
    assert lost, "all of these pages were saved already: the test proves nothing"


def test_a_sparse_file_that_grows_before_t(tmp_path):
    """Data that is written through the file after all its pages were protected, but before T, is saved."""
    size, late = 2 << 30, 1 << 30
    file = os.memfd_create("sparse")
    os.ftruncate(file, size)
    memory = mmap.mmap(file, size)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    words = np.frombuffer(memory, "<u8").reshape(-1, 512)
    words[: 32 * MIB // PAGE, 0] = 1
    pwrite = functools.partial(os.pwrite, file, b"\1" * MIB, late)
    target = snapengine.BufferTarget(memory, pause=pwrite, resume=lambda: None)
    sink = GatedFile(tmp_path / "image")
    with snapengine.snapshot(target, sink, memory_limit=16 * MIB, arming="two-step") as running:
        try:
            words[late // PAGE : (late + MIB) // PAGE] = LATER
        finally:
            sink.gate.set()
    os.close(file)
    with open_image(tmp_path / "image") as image:
        assert image.read_at(words.ctypes.data + late, MIB) == b"\1" * MIB
    assert running.result.lost_pages == 0


class Replaced(ProcessTarget):
    """Another file replaces its memory after its mappings were listed, before they are registered."""

    def registered(self, uffd):
        self.child.act("replace", EARLY, COUNT)
        return super().registered(uffd)


@pytest.mark.parametrize("arming", ["plain", "two-step"])
def test_another_file_in_its_place_before_it_is_registered(tmp_path, place, arming):
    """The image has nothing of the old file, and a write to a hole of the new one does not block."""
    sink = GatedFile(tmp_path / "image")
    with Child("memfd", place("memfd")) as child:
        target = Replaced(child.pid, f"{child.addr:x}-{child.addr + N_PAGES * PAGE:x}", deadline=30.0)
        target.child = child
        with snapengine.snapshot(target, sink, memory_limit=16 * MIB, arming=arming):
            try:
                child.act("touch", EARLY + COUNT - 1, 1)
            finally:
                sink.gate.set()
        found, lost = read(tmp_path / "image", child.addr)
    wanted = np.repeat(expected(1)[:, None], 2, axis=1)
    replaced = set(range(EARLY, EARLY + COUNT))
    assert lost <= replaced
    wanted[EARLY : EARLY + COUNT] = LATER
    wanted[EARLY + COUNT - 1] = 0
    right = (found == wanted).all(axis=1)
    right[sorted(lost)] = True
    assert right.all(), f"pages that are wrong, but not reported as lost: {np.flatnonzero(~right)[:8]}"
