"""Where each region lies: among the mappings, in the numbering of pages, beside other regions.

The loops over all regions of a plan; `snapengine.capture.region_plan` decides how each is tracked and read.
"""

from libc.stdint cimport uint64_t

from snapengine.kernel.procmaps_line cimport Mapping
from snapengine.regions cimport Region, RegionPlan, is_shared

cdef uint64_t PAGE = 4096
cdef uint64_t HUGE_PAGES = 512


cdef Py_ssize_t _first_behind(list mappings, uint64_t addr, Py_ssize_t guess) except -1:
    """The first mapping that ends behind `addr`: number `guess`, if regions come in order."""
    cdef Py_ssize_t low = 0
    cdef Py_ssize_t high = len(mappings)
    cdef Py_ssize_t middle
    if 0 < guess < high and (<Mapping?>mappings[guess - 1]).end <= addr < (<Mapping?>mappings[guess]).end:
        return guess
    while low < high:
        middle = (low + high) // 2
        if (<Mapping?>mappings[middle]).end <= addr:
            low = middle + 1
        else:
            high = middle
    return low


cdef list _covering(list mappings, Py_ssize_t first, uint64_t start, uint64_t end):
    """The mappings from `first` on that hold all of [start, end); an empty list if they do not."""
    cdef Py_ssize_t last = first
    cdef Mapping mapping
    while last < len(mappings):
        mapping = mappings[last]
        if mapping.start > start:
            break
        last += 1
        start = mapping.end
        if start >= end:
            return mappings[first:last]
    return []


cdef bint _without_file(list covered) except -1:
    cdef Mapping mapping
    for mapping in covered:
        if mapping.inode != 0 or mapping.device != "00:00":
            return False
    return len(covered) > 0


cdef RegionPlan _place(Region region, list mappings, Py_ssize_t first, uint64_t start, uint64_t end,
                       uint64_t after):
    """A plan without what is to be decided. Its page numbers are `after` or more."""
    cdef RegionPlan plan = RegionPlan.__new__(RegionPlan)
    cdef Py_ssize_t behind = _first_behind(mappings, end, first + 1)
    cdef uint64_t size = region.page_size
    cdef uint64_t addr = start & ~(PAGE - 1)
    cdef uint64_t page_end = (end + PAGE - 1) & ~(PAGE - 1)
    cdef uint64_t unit = size // PAGE
    # Page numbers follow addresses modulo a huge page, so that units begin at whole bitmap words.
    cdef uint64_t align = max(unit, HUGE_PAGES)
    plan.region = region
    plan.addr = plan.source = addr
    plan.pages = (page_end - addr) // PAGE
    plan.first_page = (after + align - 1) // align * align + addr // PAGE % align
    plan.unit_pages = unit
    plan.track_start = addr & ~(size - 1)
    plan.track_end = (page_end + size - 1) // size * size
    plan.file = -1
    plan.reading, plan.presence = "memory", "bits"
    plan.shared = is_shared(region.kind)
    plan.alone_before = first > 0 and (<Mapping>mappings[first - 1]).end == start
    plan.alone_after = behind < len(mappings) and (<Mapping>mappings[behind]).start == end
    return plan


cdef bint _follows(RegionPlan before, RegionPlan plan, list mappings, Py_ssize_t first) except -1:
    """Whether nothing is mapped between the two, the second of which begins with mapping `first`."""
    return first > 0 and (<Mapping>mappings[first - 1]).end == before.track_end \
        and first < len(mappings) and (<Mapping>mappings[first]).start == plan.track_start


cdef int _take_over(RegionPlan plan, RegionPlan model) except -1:
    """What `decide` may set for memory without a file."""
    plan.reading, plan.presence = model.reading, model.presence
    plan.missing, plan.check = model.missing, model.check
    plan.own, plan.keep_huge = model.own, model.keep_huge
    return 0


def lay_out(list regions not None, list mappings not None, uncovered, decide):
    """The plans of the regions, in their order.

    ``uncovered(region)``: what to take for the mappings of a region that is not mapped as a whole; it may
    raise. ``decide(plan, mappings)``: set how it is tracked and read. Of private memory that no file is
    behind, nothing but that matters, so it is asked once.
    """
    cdef Region region
    cdef RegionPlan plan
    cdef RegionPlan before = None
    cdef RegionPlan model = None
    cdef Py_ssize_t first = 0
    cdef uint64_t start, end
    cdef uint64_t after = 0
    cdef list plans = []
    for region in regions:
        start, end = region.addr, region.addr + region.length
        first = _first_behind(mappings, start, first + 1)
        covered = _covering(mappings, first, start, end) or uncovered(region)
        plan = _place(region, mappings, first, start, end, after)
        plan.follows = before is not None and _follows(before, plan, mappings, first)
        if region.kind != "anon" or not _without_file(covered):
            decide(plan, covered)
        elif model is None:
            decide(plan, covered)
            model = plan
        else:
            _take_over(plan, model)
        plans.append(plan)
        before = plan
        after = plan.first_page + plan.pages
    return plans


cdef list _by_address(list items, list addrs):
    """The items in the order of `addrs`. Those of a process are in it already: to find that is cheaper."""
    cdef Py_ssize_t i
    for i in range(1, len(addrs)):
        if addrs[i] < addrs[i - 1]:
            return [items[i] for i in sorted(range(len(items)), key=addrs.__getitem__)]
    return items


def first_overlap(list regions not None):
    """By address, the first two regions that overlap; or None."""
    cdef Region left = None
    cdef Region right
    cdef uint64_t start
    cdef uint64_t end = 0
    for right in _by_address(regions, [(<Region?>region).addr for region in regions]):
        start = right.addr
        if left is not None and end > start:
            return left, right
        end = right.addr + right.length
        left = right
    return None


def first_shared_unit(list plans not None):
    """By address, the first two plans whose regions have a page in common, larger than 4 KiB; or None."""
    cdef RegionPlan left = None
    cdef RegionPlan right
    for right in _by_address(plans, [(<RegionPlan?>plan).track_start for plan in plans]):
        if left is not None and left.track_end > right.track_start \
                and max(left.unit_pages, right.unit_pages) > 1:
            return left, right
        left = right
    return None
