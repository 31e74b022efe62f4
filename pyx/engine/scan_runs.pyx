"""Scans of the page tables of runs of regions, and recording of their results.

PAGEMAP_SCAN skips unmapped ranges, so one call for a run of small regions with nothing mapped between them
takes half as long as a call for each. `pyx/engine/populated` describes what is scanned when. Runs on the
walkers.
"""

from libc.stdint cimport uint64_t

from snapengine.base.bitmap cimport bits_clear, bits_or
from snapengine.kernel.linux cimport PAGE_IS_HUGE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN
from snapengine.kernel.pagemap cimport pagemap_read, scan_step, scan_t
from snapengine.engine.state cimport clear_pages, next_filled, note_present

cdef uint64_t PAGE = 4096
cdef uint64_t POPULATED = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
# The slow scan of so many pages takes as long as one call for each of 512 runs.
cdef uint64_t DENSE_PAGES = 36000


cdef bint clip(region_t *region, uint64_t *start, uint64_t *end) noexcept nogil:
    start[0] = max(start[0], region.addr)
    end[0] = min(end[0], region.addr + region.pages * PAGE)
    return start[0] < end[0]


cdef void _clear_huge(capture_t *capture, uint64_t page, uint64_t end) noexcept nogil:
    cdef uint64_t stop = 0
    while next_filled(capture, &page, end, &stop):
        bits_clear(capture.huge, page >> 9, ((stop - 1) >> 9) - (page >> 9) + 1)
        page = stop


cdef void set_present(capture_t *capture, region_t *region, uint64_t start, uint64_t end,
                      bint present) noexcept nogil:
    cdef uint64_t first, n
    if not clip(region, &start, &end):
        return
    first = region.first_page + (start - region.addr) // PAGE
    n = (end - start + PAGE - 1) // PAGE
    if present:
        note_present(capture, first, n)
        return
    clear_pages(capture, capture.present, first, n)
    if region.keep_huge:
        _clear_huge(capture, first, first + n)


cdef void _set_huge(capture_t *capture, region_t *region, uint64_t start, uint64_t end) noexcept nogil:
    """Set only units that lie completely inside the region's own bytes."""
    cdef uint64_t first, unit, stop
    if not region.keep_huge or not clip(region, &start, &end):
        return
    first = region.first_page + (start - region.addr) // PAGE
    unit = (max(first, region.first_page + (region.start > region.addr)) + 511) >> 9
    stop = first + (end - start + PAGE - 1) // PAGE - (1 if region.end & 4095 and end >= region.end else 0)
    if stop >> 9 > unit:
        bits_or(capture.huge, unit, (stop >> 9) - unit)     # atomic: fault threads read it before T


cdef void begin_scan(capture_t *capture, scan_t *scan, uint64_t start, uint64_t end, uint64_t mask,
                     uint64_t anyof, uint64_t returned) noexcept nogil:
    scan.fd = capture.pagemap
    scan.next = start
    scan.end = end
    scan.flags = 0
    scan.mask = mask
    scan.anyof = anyof
    scan.without = 0
    scan.returned = returned
    scan.err = 0
    scan.stop = &capture.failed


cdef int _record_swapped(capture_t *capture, region_t *region, uint64_t start, uint64_t end) noexcept nogil:
    """Before Linux 6.15 PAGEMAP_SCAN reports guard pages as swapped. The page table entries distinguish
    them."""
    cdef uint64_t entries[64]
    cdef uint64_t i, n
    cdef int err
    while start < end:
        n = min((end - start) // PAGE, <uint64_t>64)
        err = pagemap_read(capture.pagemap, start, entries, n)
        if err:
            return err
        for i in range(n):
            if entries[i]:
                set_present(capture, region, start + i * PAGE, start + (i + 1) * PAGE, True)
        start += n * PAGE
    return 0


cdef int _record_found(capture_t *capture, region_t *region, uint64_t start, uint64_t end,
                       uint64_t categories) noexcept nogil:
    if not capture.guard and not categories & PAGE_IS_PRESENT:
        return _record_swapped(capture, region, start, end)
    set_present(capture, region, start, end, True)
    return 0


cdef region_t *_region_of(run_t run, uint64_t addr) noexcept nogil:
    """The first region of the run that ends beyond `addr`."""
    cdef int low = 0
    cdef int high = run.n - 1
    cdef int middle
    while low < high:
        middle = (low + high) // 2
        if run.first[middle].addr + run.first[middle].pages * PAGE <= addr:
            low = middle + 1
        else:
            high = middle
    return run.first + low


cdef int _record_run(capture_t *capture, run_t run, uint64_t start, uint64_t end,
                     uint64_t categories) noexcept nogil:
    """Record a range that was found populated. Mappings that have appeared between two regions since belong
    to none."""
    cdef region_t *region = _region_of(run, start)
    cdef uint64_t first, last
    cdef int err = 0
    while region < run.first + run.n and region.addr < end and not err:
        first = start
        last = end
        if clip(region, &first, &last):
            err = _record_found(capture, region, first, last, categories)
            if categories & PAGE_IS_HUGE and region.unit_pages == 1:
                _set_huge(capture, region, first, last)
        region += 1
    return err


cdef void _remove(capture_t *capture, run_t run, uint64_t start, uint64_t end) noexcept nogil:
    cdef region_t *region = _region_of(run, start)
    while region < run.first + run.n and region.addr < end:
        set_present(capture, region, start, end, False)
        region += 1


cdef int scan_populated(capture_t *capture, lane_t *lane, run_t run, uint64_t start,
                        uint64_t end) noexcept nogil:
    cdef int i, found
    cdef int err = 0
    # hugetlb pages are never swapped: an entry that looks swapped is the marker of a protected hole.
    begin_scan(capture, &lane.scan, start, end, 0,
               PAGE_IS_PRESENT if run.first.unit_pages > 1 else POPULATED, POPULATED | PAGE_IS_HUGE)
    lane.scan.without = capture.guard
    while not err:
        found = scan_step(&lane.scan)
        if found <= 0:
            return lane.scan.err
        for i in range(found):
            err = err or _record_run(capture, run, lane.scan.found[i].start, lane.scan.found[i].end,
                                     lane.scan.found[i].categories)
    return err


cdef int _record_populated(capture_t *capture, run_t run, uint64_t start, uint64_t end) noexcept nogil:
    """Record pages that are not protected but populated."""
    cdef scan_t scan
    cdef int i, found
    cdef int err = 0
    begin_scan(capture, &scan, start, end, PAGE_IS_WRITTEN, POPULATED, POPULATED)
    scan.without = capture.guard
    while not err:
        found = scan_step(&scan)
        if found <= 0:
            return scan.err
        for i in range(found):
            err = err or _record_run(capture, run, scan.found[i].start, scan.found[i].end,
                                     scan.found[i].categories)
    return err


cdef int remove_unprotected(capture_t *capture, lane_t *lane, run_t run, uint64_t start,
                            uint64_t end) noexcept nogil:
    cdef int i, found
    cdef int err = 0
    begin_scan(capture, &lane.scan, start, end, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN)
    while not err:
        found = scan_step(&lane.scan)
        if found <= 0:
            return lane.scan.err
        for i in range(found):
            _remove(capture, run, lane.scan.found[i].start, lane.scan.found[i].end)
        start = lane.scan.found[0].start
        end = lane.scan.found[found - 1].end
        if end - start < DENSE_PAGES * PAGE:
            err = _record_populated(capture, run, start, end)
        else:
            for i in range(found):
                err = err or _record_populated(capture, run, lane.scan.found[i].start,
                                               lane.scan.found[i].end)
    return err
