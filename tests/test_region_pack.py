"""The fast path that packs a region gives the bytes of the slow one, or defers to it."""

import itertools

import pytest

from snapengine.image.encode import _region_entry, region_entries
from snapengine.image.region_pack import numbers_ascend, pack_regions
from snapengine.regions import Region

PAGE = 4096
ODD = [
    Region("é", PAGE, PAGE),
    Region("n" * 256, PAGE, PAGE),
    Region("", PAGE + 7, 1),
    Region("s", PAGE, PAGE, PAGE, "shared"),
    Region("h", 2 << 20, 2 << 20, 2 << 20, "hugetlb"),
    Region("high", (1 << 64) - PAGE, PAGE),
    Region("anon@7f0000000000", 0x7F0000000000, 1 << 46),
]


def test_the_same_bytes():
    placed = [(region, page) for region in ODD for page in (0, 512, (1 << 40) - (1 << 36))]
    placed = [(r, page) for r, page in placed if page + r.length // PAGE < 1 << 40]
    assert pack_regions(placed, _region_entry) == [_region_entry(*item) for item in placed]


@pytest.mark.parametrize(
    ("region", "page"),
    [
        (Region("x", -PAGE, PAGE), 0),
        (Region("x", PAGE, 0), 0),
        (Region("x", PAGE, -1), 0),
        (Region("x", PAGE, 1 << 64), 0),
        (Region("x", PAGE, PAGE), -1),
        (Region("x", PAGE, PAGE), 1 << 40),
        (Region("x\0y", PAGE, PAGE), 0),
        (Region("x" * 4097, PAGE, PAGE), 0),
        (Region("x", PAGE, PAGE, 8192), 0),
        (Region("x", PAGE, PAGE, PAGE, "other"), 0),
    ],
)
def test_the_same_refusals(region, page):
    with pytest.raises(ValueError, match="region ") as slow:
        _region_entry(region, page)
    with pytest.raises(ValueError, match="region ") as fast:
        region_entries([(region, page)])
    assert str(fast.value) == str(slow.value)


def test_page_numbers():
    placed = [(Region("a", 0, 3 * PAGE), 0), (Region("b", PAGE + 1, PAGE), 3), (Region("c", 0, PAGE), 5)]
    assert numbers_ascend(placed)
    assert not numbers_ascend(placed[::-1])
    assert len(region_entries(placed[::-1])) == 3
    close = [placed[0], (placed[1][0], 3), (placed[2][0], 4)]
    for order in itertools.permutations(close):
        assert not numbers_ascend(order)
        with pytest.raises(ValueError, match="regions 'b' and 'c' share page number 4"):
            region_entries(order)
