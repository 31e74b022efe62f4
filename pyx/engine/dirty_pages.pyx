"""The pages that dirty logging copies: those written since their last copy, and at the end those that no scan
reports.

PAGEMAP_SCAN returns the written pages of a region and protects them again in one step. A page is copied after
that: a write during the copy makes it dirty for the next round. Source: Linux 6.7,
Documentation/admin-guide/mm/pagemap.rst.
"""

from libc.errno cimport EPERM, ETIMEDOUT
from libc.stdint cimport uint64_t

from snapengine.base.atomics cimport snap_ctz, snap_load
from snapengine.base.bitmap cimport bits_clear, bits_fill, bits_mask, bits_next, bits_test
from snapengine.base.pthreads cimport pthread_mutex_lock, pthread_mutex_unlock, snap_now_ns
from snapengine.engine.arming cimport register_attached
from snapengine.engine.recheck cimport drop_shadow, populate_shadow
from snapengine.engine.source cimport copy_run, data_from, populated, put_pages
from snapengine.engine.state cimport note_present
from snapengine.image.format cimport SNAP_ENTRY_MAX_PAGES, SNAP_HOLE
from snapengine.kernel.linux cimport (
    ECANCELED, PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING, UFFDIO_REGISTER_MODE_WP,
)
from snapengine.kernel.pagemap cimport scan_step, scan_t
from snapengine.pipeline.pool cimport lane_room

cdef uint64_t PAGE = 4096
cdef uint64_t UNIT_PAGES = 512
cdef uint64_t OWN_PAGE = PAGE_IS_PRESENT | PAGE_IS_FILE


cdef void _setup_scan(capture_t *capture, region_t *region, scan_t *scan, bint protect) noexcept nogil:
    """Scan for pages of the region that were written since they were protected, or were never protected."""
    scan.fd = capture.pagemap
    scan.next = region.track_start
    scan.end = region.track_end
    # CHECK_WPASYNC: a new mapping over the region is an error, not silently skipped.
    scan.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC if protect else PM_SCAN_CHECK_WPASYNC
    scan.mask = PAGE_IS_WRITTEN
    # A hole of private memory counts as written, has nothing to copy, and must get no marker. A page of
    # shared memory that has lost its page table entry may have been written before that.
    if region.shared and not region.sparse:
        scan.anyof = 0
    elif region.unit_pages > 1:
        scan.anyof = PAGE_IS_PRESENT
    else:
        scan.anyof = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    scan.without = capture.guard        # guard pages have nothing to copy
    scan.returned = PAGE_IS_WRITTEN | (OWN_PAGE if region.own else 0)
    scan.err = 0
    scan.stop = &capture.failed


cdef int _step(capture_t *capture, scan_t *scan) noexcept nogil:
    """Under the lock: the thread that answers missing faults may have to unregister a page and register it
    again (`pyx/engine/fault_threads`), and a scan between these two calls would fail."""
    pthread_mutex_lock(&capture.lock)
    cdef int found = scan_step(scan)
    pthread_mutex_unlock(&capture.lock)
    return found


cdef int _expired(capture_t *capture, uint64_t deadline) noexcept nogil:
    return snap_load(&capture.failed) or snap_now_ns() > deadline


cdef int copy_pages(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t end,
                    bint wait, uint64_t deadline) noexcept nogil:
    """Copy the populated pages of [page, end): 0, ETIMEDOUT, or another errno."""
    cdef uint64_t n, mask, data, first, run
    cdef int err
    while page < end:
        if not page & (UNIT_PAGES - 1):
            page = min(data_from(region, page), end)
            if page == end:
                return 0
        n = min(64 - (page & 63), end - page)
        mask = bits_mask(page & 63, n)
        data = populated(capture, lane, region, page & ~<uint64_t>63, mask)
        while data:
            first = snap_ctz(data)
            run = min(<uint64_t>snap_ctz(~(data >> first)), 64 - first) if ~(data >> first) else 64
            err = lane_room(capture.pool, &lane.slot, run, wait)
            if err:
                return err
            err = copy_run(capture, lane, region, (page & ~<uint64_t>63) + first, run)
            if err:
                return err
            bits_fill(capture.saved, (page & ~<uint64_t>63) + first, run)
            data &= ~bits_mask(first, run)
        page += n
        if _expired(capture, deadline):
            return ETIMEDOUT
    return 0


cdef int _track_again(capture_t *capture, region_t *region) noexcept nogil:
    """An attached process has mapped something over a part of the region: register that, too, if it can be
    registered."""
    return register_attached(capture, region, UFFDIO_REGISTER_MODE_WP)


cdef int _restart_scan(capture_t *capture, region_t *region, scan_t *scan) noexcept nogil:
    """The scan has failed half-way, and a second scan would not report the pages that it has protected again.
    So protect all pages, then list all pages, including those that cannot be tracked, which are thus copied
    in every round."""
    cdef int err = _track_again(capture, region)
    cdef int found = 1
    if err:
        return err
    _setup_scan(capture, region, scan, True)
    scan.flags = PM_SCAN_WP_MATCHING
    while found > 0:
        found = _step(capture, scan)
    if found < 0:
        return scan.err
    _setup_scan(capture, region, scan, False)
    scan.flags = 0
    scan.mask = 0
    return 0


cdef int copy_written(capture_t *capture, lane_t *lane, region_t *region, bint wait,
                      uint64_t deadline) noexcept nogil:
    cdef scan_t *scan = &lane.scan
    cdef int i, found, err
    cdef uint64_t start, end, stop = region.addr + region.pages * PAGE
    _setup_scan(capture, region, scan, True)
    while True:
        found = _step(capture, scan)
        if found < 0 and scan.err == EPERM and capture.attached:
            err = _restart_scan(capture, region, scan)
            if err:
                return err
            continue
        if found < 0:
            return scan.err
        if found == 0:
            return 0
        for i in range(found):
            start = max(scan.found[i].start, region.addr)
            end = min(scan.found[i].end, stop)
            if start >= end:
                continue
            start = region.first_page + (start - region.addr) // PAGE
            end = region.first_page + (end - region.addr + PAGE - 1) // PAGE
            # A written page is populated now, whatever an earlier scan found.
            note_present(capture, start, end - start)
            lane.extent_region = NULL
            if region.own:
                _note_own(capture, scan.found[i].categories, start, end - start)
            err = copy_pages(capture, lane, region, start, end, wait, deadline)
            if err:
                return err


cdef int _put_hole(capture_t *capture, lane_t *lane, uint64_t page, uint64_t end) noexcept nogil:
    cdef uint64_t n
    cdef int err
    while page < end:
        n = min(end - page, <uint64_t>SNAP_ENTRY_MAX_PAGES)
        err = lane_room(capture.pool, &lane.slot, 1, False)
        if err:
            return err
        put_pages(capture, lane, page, n, SNAP_HOLE)
        page += n
    return 0


cdef uint64_t _filled_from(capture_t *capture, region_t *region, uint64_t page, uint64_t end) noexcept nogil:
    """The first page from `page` on in a unit that may hold something; `end` if there is none."""
    cdef uint64_t last = (end + UNIT_PAGES - 1) // UNIT_PAGES
    cdef uint64_t unit = bits_next(capture.filled, page // UNIT_PAGES, last)
    return min(data_from(region, max(page, unit * UNIT_PAGES)), end) if unit < last else end


cdef void _note_own(capture_t *capture, uint64_t categories, uint64_t first, uint64_t n) noexcept nogil:
    """Swapped pages are the process's own pages, too."""
    if categories & PAGE_IS_FILE:
        bits_clear(capture.own_copies, first, n)
    else:
        bits_fill(capture.own_copies, first, n)


cdef int copy_discarded(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
    """In the pause: copy pages that were copied as the process's own pages, and are not own pages in its page
    tables now. (A swapped page looks like that, too, and is copied once more.)"""
    cdef scan_t *scan = &lane.scan
    cdef uint64_t page, end
    cdef int i, found
    cdef int err = 0
    _setup_scan(capture, region, scan, False)
    scan.flags = scan.mask = scan.anyof = 0
    scan.returned = OWN_PAGE
    while True:
        found = _step(capture, scan)
        if found <= 0:
            return scan.err
        for i in range(found):
            if scan.found[i].categories & OWN_PAGE == PAGE_IS_PRESENT:
                continue
            page = region.first_page + (max(scan.found[i].start, region.addr) - region.addr) // PAGE
            end = region.first_page + min((scan.found[i].end - region.addr) // PAGE, region.pages)
            page = bits_next(capture.own_copies, page, end)
            while page < end and not err:
                err = copy_pages(capture, lane, region, page, page + 1, False, <uint64_t>-1)
                page = bits_next(capture.own_copies, page + 1, end)
            if err:
                return err


cdef int copy_punched(capture_t *capture, lane_t *lane, region_t *region, bint wait,
                      uint64_t deadline) noexcept nogil:
    """Huge pages of a file. A unit whose shadow mapping is populated only now may have been punched out and
    filled again between its copy and now, so it is copied again."""
    cdef uint64_t page = region.first_page
    cdef uint64_t end = region.first_page + region.pages
    cdef bint again
    cdef int err = 0
    while page < end and not err:
        again = drop_shadow(capture, region, page) or not bits_test(capture.recheck.shadowed, page >> 9)
        err = populate_shadow(capture, region, page)
        if not err and again and bits_test(capture.saved, page):
            err = copy_pages(capture, lane, region, page, min(page + region.unit_pages, end), wait, deadline)
        page += region.unit_pages
    return err


cdef int put_holes(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
    """At the end: a page that is not populated is a hole, whatever it was in an earlier round. A page that is
    populated but was never written through the target's mapping is copied now."""
    cdef uint64_t page = region.first_page
    cdef uint64_t end = page + region.pages
    cdef uint64_t n, mask, data, rest, first, run
    cdef int err
    while page < end:
        if snap_load(&capture.failed):
            return ECANCELED
        if not page & (UNIT_PAGES - 1) or page == region.first_page:
            n = _filled_from(capture, region, page, end)
            err = _put_hole(capture, lane, page, n)
            if err:
                return err
            page = n
            if page == end:
                return 0
        n = min(64 - (page & 63), end - page)
        mask = bits_mask(page & 63, n)
        data = populated(capture, lane, region, page & ~<uint64_t>63, mask)
        rest = data & ~capture.saved[page >> 6]
        while rest:
            first = snap_ctz(rest)
            err = copy_pages(capture, lane, region, (page & ~<uint64_t>63) + first,
                             (page & ~<uint64_t>63) + first + 1, False, <uint64_t>-1)
            if err:
                return err
            rest &= rest - 1
        rest = mask & ~data
        while rest:
            err = lane_room(capture.pool, &lane.slot, 64, False)
            if err:
                return err
            first = snap_ctz(rest)
            run = min(<uint64_t>snap_ctz(~(rest >> first)), 64 - first) if ~(rest >> first) else 64
            put_pages(capture, lane, (page & ~<uint64_t>63) + first, run, SNAP_HOLE)
            rest &= ~bits_mask(first, run)
        page += n
    return 0

cdef int count_written(capture_t *capture, lane_t *lane, region_t *region, uint64_t *pages) noexcept nogil:
    cdef scan_t *scan = &lane.scan
    cdef uint64_t before = pages[0]
    cdef int i, found
    _setup_scan(capture, region, scan, False)
    while True:
        found = _step(capture, scan)
        if found < 0 and scan.err == EPERM and capture.attached:
            _track_again(capture, region)
            _setup_scan(capture, region, scan, False)
            scan.flags = 0          # memory that cannot be tracked counts as written
            pages[0] = before
            continue
        if found < 0:
            return scan.err
        if found == 0:
            return 0
        for i in range(found):
            pages[0] += (scan.found[i].end - scan.found[i].start) // PAGE
