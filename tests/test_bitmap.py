"""Claims: one winner for each page; counting and searching bits."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapengine.base.bitmap import Bitmap


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


@pytest.fixture(scope="module")
def driver(build_driver):
    return build_driver("bitmap_driver")


@pytest.mark.slow_build
@pytest.mark.parametrize("run", [1, 7, 64])
def test_every_page_is_won_once(driver, run):
    """Without the GIL, all threads on the same words at the same time."""
    threads, words = 4, 50_000
    bitmap = Bitmap(64 * words)
    with ThreadPoolExecutor(threads) as pool:
        races = [pool.submit(driver.claim_all, bitmap, run, threads) for _ in range(threads)]
        won = [race.result() for race in races]
    assert all(sum(word) == 2**64 - 1 for word in zip(*won, strict=True)), "each bit set in just one"
    assert bitmap.count() == bitmap.pages
    assert not bitmap.claim(0)


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
