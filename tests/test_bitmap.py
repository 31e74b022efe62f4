"""Claims: one winner for each page, and the counting and searching over them."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapengine.bitmap import Bitmap


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1)))))
def test_as_a_set(case):
    pages, claims = case
    bitmap, model = Bitmap(pages), set()
    for page in claims:
        assert bitmap.claim(page) == (page not in model)
        model.add(page)
    assert bitmap.count() == len(model)
    assert [bitmap.test(page) for page in range(pages)] == [page in model for page in range(pages)]
    for first in range(pages + 1):
        assert bitmap.next(first) == min((page for page in model if page >= first), default=pages)


def test_every_page_is_won_once():
    pages, threads = 20_000, 8
    bitmap, start = Bitmap(pages), threading.Barrier(threads)
    won = [[] for _ in range(threads)]

    def run(mine):
        start.wait()
        mine += [page for page in range(pages) if bitmap.claim(page)]

    workers = [threading.Thread(target=run, args=(mine,)) for mine in won]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(page for mine in won for page in mine) == list(range(pages))
    assert bitmap.count() == pages


@pytest.mark.parametrize("pages", [1, 63, 64, 65])
def test_bounds(pages):
    bitmap = Bitmap(pages)
    assert bitmap.pages == pages
    assert bitmap.claim(pages - 1)
    assert bitmap.next(pages) == pages
    for call in (bitmap.claim, bitmap.test):
        with pytest.raises(IndexError):
            call(pages)
        with pytest.raises(OverflowError):
            call(-1)


@pytest.mark.parametrize("pages", [0, (1 << 40) + 1])
def test_impossible_sizes(pages):
    with pytest.raises(ValueError, match="pages"):
        Bitmap(pages)


def test_a_bitmap_of_a_large_machine_costs_only_what_is_used():
    bitmap = Bitmap(1 << 36)  # 8 GiB of bits, for 256 TiB of memory
    assert bitmap.claim((1 << 36) - 1)
    assert bitmap.test((1 << 36) - 1)
    assert not bitmap.test(0)
