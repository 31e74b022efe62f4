"""The layout of regions, compared with a simple implementation."""

import pytest

from snapengine.capture.layout import first_overlap, first_shared_unit, lay_out
from snapengine.kernel.procmaps import Mapping, covering
from snapengine.regions import Region

PAGE, MIB = 4096, 1 << 20


def mapping(start, end, inode=0):
    return Mapping(start * PAGE, end * PAGE, "rw-p", 0, "00:01" if inode else "00:00", inode, "")


def region(start, end, kind="anon", page_size=PAGE):
    return Region(f"{kind}@{start:x}", start * PAGE, (end - start) * PAGE, page_size, kind)


def refuse(region):
    raise LookupError(region.name)


def plans_of(regions, mappings, decide=lambda plan, covered: None):
    return lay_out(regions, mappings, refuse, decide)


MAPPINGS = [mapping(10, 12), mapping(12, 14, 7), mapping(20, 30), mapping(40, 50), mapping(50, 51)]


@pytest.mark.parametrize("order", [1, -1])
def test_regions_among_mappings(order):
    spans = [(10, 12), (12, 14), (20, 30), (40, 51)]
    regions = [region(*span) for span in spans][::order]
    starts, ends = {m.start for m in MAPPINGS}, {m.end for m in MAPPINGS}
    asked = []
    plans = plans_of(regions, MAPPINGS, lambda plan, covered: asked.append((plan.region, covered)))
    after = 0
    for plan in plans:
        one = plan.region
        end = one.addr + one.length
        assert (plan.addr, plan.track_start, plan.track_end) == (one.addr, one.addr, end)
        assert (plan.pages, plan.unit_pages, plan.source) == (one.length // PAGE, 1, one.addr)
        assert plan.first_page == -(-after // 512) * 512 + one.addr // PAGE % 512
        assert (plan.alone_before, plan.alone_after) == (one.addr in ends, end in starts)
        after = plan.first_page + plan.pages
    assert [one.region for one in plans] == regions
    # Of all memory without a file only the first region is asked about; of other memory, each region.
    assert [one for one, _ in asked] == [regions[0], region(12, 14)]
    assert all(covered == covering(MAPPINGS, one.addr, one.addr + one.length) for one, covered in asked)


def test_what_follows():
    """A region follows another only if nothing is mapped between them, not even the rest of a mapping."""
    def follows(*spans):
        return [plan.follows for plan in plans_of([region(*span) for span in spans], MAPPINGS)]

    assert follows((10, 12), (12, 14), (20, 30), (40, 51)) == [False, True, True, True]
    assert follows((10, 12), (20, 30)) == [False, False]
    assert follows((10, 13), (20, 30)) == [False, False]
    assert follows((20, 29), (40, 51)) == [False, False]
    assert follows((20, 30), (41, 51)) == [False, False]
    assert follows((40, 50), (50, 51), (20, 30)) == [False, True, False]


def test_what_is_decided_for_memory_without_a_file_holds_for_all_of_it():
    def decide(plan, covered):
        plan.reading, plan.presence = "process", "all"
        plan.missing = plan.check = plan.own = plan.keep_huge = True

    first, second = plans_of([region(20, 30), region(40, 51)], MAPPINGS, decide)
    for name in ("reading", "presence", "missing", "check", "own", "keep_huge"):
        assert getattr(second, name) == getattr(first, name)
    assert (second.file, second.sparse, second.shadow) == (-1, False, 0)


def test_what_is_not_mapped():
    with pytest.raises(LookupError, match="anon@1d"):
        plans_of([region(20, 30), region(29, 31)], MAPPINGS)
    (plan,) = lay_out([region(29, 31)], MAPPINGS, lambda _: [mapping(29, 31)], lambda plan, covered: None)
    assert plan.pages == 2


def test_a_buffer_and_its_pages():
    odd = Region("b", 20 * PAGE + 100, 2 * PAGE)
    (plan,) = plans_of([odd], MAPPINGS)
    assert (plan.addr, plan.pages, plan.first_page) == (20 * PAGE, 3, 20)
    assert (plan.alone_before, plan.alone_after) == (False, False)


def test_huge_pages():
    huge = Region("h", 3 * MIB, MIB, 2 * MIB, "hugetlb")
    (plan,) = plans_of([huge], [Mapping(2 * MIB, 6 * MIB, "rw-p", 0, "00:0f", 3, "/anon_hugepage")])
    assert (plan.track_start, plan.track_end, plan.unit_pages) == (2 * MIB, 4 * MIB, 512)
    assert plan.first_page == 256


def test_overlaps():
    assert first_overlap([region(1, 3), region(3, 5), region(8, 9)]) is None
    assert first_overlap([]) is None
    one, two = region(1, 4), region(3, 5)
    for regions in ([one, two, region(8, 9)], [region(8, 9), two, one]):
        assert first_overlap(regions) == (one, two)


def test_shared_huge_pages():
    lies = [Mapping(0, 8 * MIB, "rw-p", 0, "00:0f", 3, "/anon_hugepage")]
    parts = [Region(f"h{i}", i * MIB, MIB, 2 * MIB, "hugetlb") for i in range(4)]
    for order in (1, -1):
        left, right = first_shared_unit(plans_of(parts[::order], lies))
        assert (left.region, right.region) == (parts[0], parts[1]) or order == -1
        assert first_shared_unit(plans_of(parts[::2][::order], lies)) is None
