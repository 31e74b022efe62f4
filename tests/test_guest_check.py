"""The oracle that checks a cut, tested on a model of the guest with every kind of violation."""

from __future__ import annotations

import random
import struct

import pytest

from snapengine.guest.check import check_cut
from snapengine.guest.params import PAGE_BYTES, GuestParams
from snapengine.guest.pattern import class_of, initial_page, write_page

MIB = 1 << 20
LAST = 511


class Model:
    """A model of a guest's memory: the same writes, one by one, in Python."""

    def __init__(self, params: GuestParams) -> None:
        self.params = params
        self.ram = bytearray(b"".join(initial_page(params, page) for page in range(params.page_count)))
        self.progress = [0] * params.threads

    def put(self, page: int, word: int, value: int) -> None:
        struct.pack_into("<Q", self.ram, page * PAGE_BYTES + word * 8, value)

    def get(self, page: int, word: int) -> int:
        value: int = struct.unpack_from("<Q", self.ram, page * PAGE_BYTES + word * 8)[0]
        return value

    def write(self, thread: int, words: int = 512) -> int:
        """The next write of `thread`, only its first `words` stores; returns its page."""
        k = self.progress[thread] + 1
        page = write_page(self.params, thread, k)
        stores = [(0, k), *((1 + u, seen) for u, seen in enumerate(self.progress)), (LAST, k)]
        for word, value in stores[:words]:
            self.put(page, word, value)
        if words >= len(stores):
            self.progress[thread] = k
        return page

    def run(self, writes: int, seed: int = 7) -> None:
        choose = random.Random(seed)
        for _ in range(writes):
            self.write(choose.randrange(self.params.threads))


PARAMS = GuestParams(size=MIB, threads=3, zero_percent=30, hole_percent=20)


@pytest.fixture
def model() -> Model:
    model = Model(PARAMS)
    model.run(200)
    return model


def violation(model: Model) -> str:
    report = check_cut(model.ram, model.params)
    assert not report.consistent
    assert report.violation is not None
    return report.violation


def latest(model: Model, thread: int, back: int = 0) -> tuple[int, int]:
    """(k, page) of the `back`-th newest write, counting only the last write of each page."""
    seen: set[int] = set()
    for k in range(model.progress[thread], 0, -1):
        page = write_page(model.params, thread, k)
        if page not in seen:
            if len(seen) == back:
                return k, page
            seen.add(page)
    raise AssertionError("not so many pages")


def unwritten(model: Model, kind: str) -> int:
    """A page of that class that was not written to."""
    return next(
        page
        for page in range(model.params.page_count)
        if class_of(model.params, page) == kind and not model.get(page, 0)
    )


@pytest.mark.parametrize("pattern", ["uniform", "hot", "sequential"])
@pytest.mark.parametrize("writes", [0, 1, 50, 2000])
def test_model_is_consistent_at_every_pattern(pattern: str, writes: int) -> None:
    model = Model(GuestParams(size=MIB, threads=3, pattern=pattern, hot_size=96 << 10, hole_percent=10))
    model.run(writes)
    report = check_cut(model.ram, model.params)
    assert report.consistent, report.violation
    assert report.writes == model.progress
    assert report.torn == [False] * 3
    assert report.written_pages == sum(1 for page in range(256) if model.get(page, 0))
    holes = sum(class_of(model.params, page) == "hole" and not model.get(page, 0) for page in range(256))
    assert report.untouched_hole_pages == holes
    assert check_cut(model.ram, model.params, model.progress).consistent


@pytest.mark.parametrize("words", [1, 2, 3, 4])
def test_torn_tip_is_allowed_and_seen(model: Model, words: int) -> None:
    done = list(model.progress)
    model.write(1, words)
    report = check_cut(model.ram, model.params)
    assert report.consistent, report.violation
    assert report.torn == [False, True, False]
    assert report.writes[1] == done[1] + 1


def test_torn_tip_of_a_page_written_before() -> None:
    model = Model(GuestParams(size=16 * PAGE_BYTES, threads=2, pattern="sequential"))
    model.run(100)
    model.write(0, 2)
    report = check_cut(model.ram, model.params)
    assert report.consistent, report.violation
    assert report.torn == [True, False]


def test_torn_tip_with_a_last_word_of_no_write(model: Model) -> None:
    page = model.write(1, 2)
    model.put(page, LAST, model.progress[1] - 3)
    assert f"page {page} " in violation(model)
    assert "torn" in violation(model)


def test_torn_tip_that_somebody_saw_complete(model: Model) -> None:
    model.write(1)
    model.write(0)
    k, page = latest(model, 1)
    model.put(page, LAST, 0 if not latest_before(model, 1, k) else latest_before(model, 1, k))
    assert f"saw write {k} of thread 1 completed" in violation(model)


def latest_before(model: Model, thread: int, k: int) -> int:
    page = write_page(model.params, thread, k)
    return max((j for j in range(1, k) if write_page(model.params, thread, j) == page), default=0)


def test_page_too_new(model: Model) -> None:
    """A page saved after T: it has write K+1 of thread 0, and write K is missing."""
    k, page = latest(model, 0)
    before = bytes(model.ram[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
    model.write(0)
    old = initial_page(PARAMS, page)
    assert before != old
    model.ram[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = old
    text = violation(model)
    assert f"page {page} (thread 0" in text
    assert f"expected write {k}, found write 0" in text


def test_page_too_old(model: Model) -> None:
    k, page = latest(model, 2, back=5)
    model.put(page, 0, k - 1)
    model.put(page, LAST, k - 1)
    assert f"page {page} (thread 2" in violation(model)
    assert f"expected write {k}, found write {k - 1}" in violation(model)


def test_write_in_a_page_of_another_write(model: Model) -> None:
    page = unwritten(model, "filled")
    model.put(page, 0, 1)
    assert f"page {page} " in violation(model)
    assert "no write up to the cut" in violation(model)


def test_write_number_from_nowhere(model: Model) -> None:
    model.put(latest(model, 0)[1], 0, 1 << 62)
    assert "found write" in violation(model)


def test_torn_page_that_is_not_the_last(model: Model) -> None:
    k, page = latest(model, 0, back=3)
    model.put(page, LAST, 0)
    assert f"page {page} (thread 0" in violation(model)
    assert f"torn: first word {k}, last word 0" in violation(model)


def test_causality(model: Model) -> None:
    """Thread 1 saw a write of thread 0 that the image does not hold."""
    _, page = latest(model, 1)
    model.put(page, 1, model.progress[0] + 1)
    assert f"page {page} (thread 1" in violation(model)
    assert f"saw write {model.progress[0] + 1} of thread 0" in violation(model)


def test_thread_left_behind_as_a_whole() -> None:
    """All pages of thread 0 are from an earlier instant: each thread alone looks consistent."""
    model = Model(PARAMS)
    model.run(100)
    early = Model(PARAMS)
    early.run(100)
    model.run(300, seed=8)
    for page in range(0, PARAMS.page_count, PARAMS.threads):
        span = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
        model.ram[span] = early.ram[span]
    assert f"but the image ends at its write {early.progress[0]}" in violation(model)


def test_clock_that_runs_backwards(model: Model) -> None:
    _, page = latest(model, 1, back=20)
    model.put(page, 1, model.progress[0])
    assert "a later write of its thread saw only" in violation(model)


def test_own_clock(model: Model) -> None:
    _, page = latest(model, 1, back=2)
    model.put(page, 2, 0)
    assert "its own clock" in violation(model)


def test_clock_of_a_thread_that_is_not(model: Model) -> None:
    _, page = latest(model, 1, back=2)
    model.put(page, 8, 1)
    assert "there is no such thread" in violation(model)


@pytest.mark.parametrize("kind", ["filled", "zero", "hole"])
@pytest.mark.parametrize("offset", [72, 2048, 4087])
def test_flipped_body_byte(model: Model, kind: str, offset: int) -> None:
    page = unwritten(model, kind)
    model.ram[page * PAGE_BYTES + offset] ^= 1
    assert f"page {page} (thread {page % 3}, {kind}): word {offset // 8} is " in violation(model)


@pytest.mark.parametrize("word", [0, 1, 8, LAST])
def test_mark_in_a_hole(model: Model, word: int) -> None:
    page = unwritten(model, "hole")
    model.put(page, word, 1)
    assert f"page {page} " in violation(model)


def test_flipped_body_byte_of_a_written_page(model: Model) -> None:
    _, page = latest(model, 1)
    model.ram[page * PAGE_BYTES + 100] ^= 0x80
    assert f"page {page} " in violation(model)


def test_pages_swapped(model: Model) -> None:
    one, two = (unwritten(model, "filled"), latest(model, 0)[1])
    first = bytes(model.ram[one * PAGE_BYTES : (one + 1) * PAGE_BYTES])
    second = bytes(model.ram[two * PAGE_BYTES : (two + 1) * PAGE_BYTES])
    model.ram[one * PAGE_BYTES : (one + 1) * PAGE_BYTES] = second
    model.ram[two * PAGE_BYTES : (two + 1) * PAGE_BYTES] = first
    violation(model)


def test_counts_of_a_paused_guest(model: Model) -> None:
    off = [model.progress[0], model.progress[1] + 1, model.progress[2]]
    report = check_cut(model.ram, PARAMS, off)
    assert report.violation == (
        f"thread 1: the image ends at write {model.progress[1]}, the guest was paused after {off[1]}"
    )
    stood = [model.progress[0], model.progress[1] + 1, model.progress[2]]
    model.write(1, 2)
    assert not check_cut(model.ram, PARAMS, stood).consistent  # torn, but the writer was paused


def test_check_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="bytes of RAM"):
        check_cut(bytearray(PAGE_BYTES), PARAMS)
    with pytest.raises(ValueError, match="2 counts for 3 threads"):
        check_cut(bytearray(PARAMS.size), PARAMS, [1, 2])
