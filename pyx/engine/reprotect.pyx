"""The second protection of two-step arming: the pages dirtied since the first one (`pyx/engine/prearm`)."""

from libc.errno cimport EAGAIN, ESRCH

from snapengine.base.atomics cimport snap_load, snap_load_relaxed
from snapengine.base.bitmap cimport bits_fill, bits_next, bits_test
from snapengine.engine.events cimport protect_left, drain_events
from snapengine.engine.memfile cimport page_exists
from snapengine.engine.parallel cimport first_region
from snapengine.engine.protect cimport protect_range
from snapengine.engine.save cimport unit_range
from snapengine.engine.state cimport (
    PRESENCE_FILE, PRESENCE_MINCORE, PRESENCE_SEEK, capture_fail, note_present, page_addr, page_at, place_of,
    region_by_addr, region_t,
)

cdef extern from "engine/controls.h" nogil:
    bint snap_control(bint on)

cdef uint64_t GAP_PAGES = 16        # protecting so many pages takes as long as one more call


cdef int _protect_child(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t addr,
                        uint64_t length) noexcept nogil:
    cdef int err = protect_left(capture, capture.uffds[uffd], addr, length)
    while err == EAGAIN and not snap_load(&capture.failed):
        drain_events(capture, lane)
        err = protect_left(capture, capture.uffds[uffd], addr, length)
    if err == ESRCH:                        # the child has ended
        return 0
    if err:
        capture_fail(capture, err, "protecting a forked child", addr)
    return err


cdef int _protect_run(capture_t *capture, lane_t *lane, region_t *region, uint64_t first,
                      uint64_t n) noexcept nogil:
    cdef uint64_t addr, length, start, end
    cdef uint64_t uffd = 1
    cdef int err
    unit_range(region, first, n, &start, &length)
    unit_range(region, first + n - 1, 1, &end, &length)
    length += end - start
    addr = start
    err = protect_range(capture, lane, addr, length)
    while not err and region.shared and uffd < snap_load_relaxed(&capture.n_uffds):
        err = _protect_child(capture, lane, uffd, addr, length)
        uffd += 1
    return err


cdef uint64_t _run_end(uint64_t *dirty, uint64_t page, uint64_t end) noexcept nogil:
    """The end of the run of dirty pages that begins at `page`. Small gaps count as dirty, except a gap
    between two words: a huge page is dirty as a whole, and must not be protected in part."""
    cdef uint64_t last = page + 1
    cdef uint64_t more
    while last < end:
        if bits_test(dirty, last):
            last += 1
            continue
        more = bits_next(dirty, last, min(end, (last | 63) + 1))
        if not last & 63 or more - last > GAP_PAGES or more > (last | 63) or more >= end:
            break
        last = more
    return last


cdef void _dirty_for_all(capture_t *capture, uint64_t addr) noexcept nogil:
    """Set the page at `addr` dirty in every region that has bytes in it. These are neighbours by address."""
    cdef int place = place_of(capture, addr)
    cdef uint64_t page
    while place < capture.n_regions and region_by_addr(capture, place).track_start <= addr:
        page = page_at(region_by_addr(capture, place), addr)
        bits_fill(capture.prearm.dirty, page, 1)
        bits_fill(capture.prearm.dirty_units, page >> 9, 1)
        place += 1


cdef void share_edges(capture_t *capture) noexcept nogil:
    cdef int i, which
    cdef uint64_t page
    cdef region_t *region
    for i in range(capture.n_regions):
        region = &capture.regions[i]
        for which in range(2):
            page = region.first_page + (region.pages - 1 if which else 0)
            if (region.end if which else region.start) & 4095 and bits_test(capture.prearm.dirty, page):
                _dirty_for_all(capture, page_addr(region, page))


cdef bint _next_dirty_units(capture_t *capture, uint64_t *page, uint64_t end,
                            uint64_t *run_end) noexcept nogil:
    """The next run of units with dirty pages in [page, end); False if there is none."""
    cdef uint64_t last = (end + 511) >> 9
    cdef uint64_t unit = bits_next(capture.prearm.dirty_units, page[0] >> 9, last)
    if page[0] >= end or unit == last:
        return False
    page[0] = max(page[0], unit << 9)
    while unit < last and bits_test(capture.prearm.dirty_units, unit):
        unit += 1
    run_end[0] = min(unit << 9, end)
    return True


cdef void _note_filled(capture_t *capture, region_t *region) noexcept nogil:
    cdef uint64_t page = region.first_page
    cdef uint64_t end = region.first_page + region.pages
    cdef uint64_t units_end = 0
    while _next_dirty_units(capture, &page, end, &units_end):
        page = bits_next(capture.prearm.dirty, page, units_end)
        while page < units_end:
            # Pages that read-around has added to a fault may still be holes.
            if not bits_test(capture.present, page) and page_exists(region, page):
                note_present(capture, page, 1)
            page = bits_next(capture.prearm.dirty, page + 1, units_end)


cdef void note_filled_holes(capture_t *capture) noexcept nogil:
    cdef int i
    for i in range(capture.n_regions):
        if capture.regions[i].presence in (PRESENCE_FILE, PRESENCE_SEEK, PRESENCE_MINCORE):
            _note_filled(capture, &capture.regions[i])


cdef int _protect_part(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                       uint64_t end) noexcept nogil:
    cdef uint64_t last
    cdef uint64_t units_end = 0
    cdef int err = 0
    while not err and _next_dirty_units(capture, &page, end, &units_end):
        page = bits_next(capture.prearm.dirty, page, units_end)
        while page < units_end and not err:
            last = _run_end(capture.prearm.dirty, page, units_end)
            err = _protect_run(capture, lane, region, page, last - page)
            page = bits_next(capture.prearm.dirty, last, units_end)
    return err


cdef uint64_t reprotect_pieces(capture_t *capture) noexcept nogil:
    return (capture.page_end + capture.prearm.piece_pages - 1) // capture.prearm.piece_pages


cdef void reprotect(capture_t *capture, lane_t *lane, uint64_t piece) noexcept nogil:
    cdef uint64_t first = piece * capture.prearm.piece_pages
    cdef uint64_t end = first + capture.prearm.piece_pages
    cdef int i = first_region(capture, first)
    cdef region_t *region
    if snap_control(capture.skip_reprotect):
        return
    while i < capture.n_regions and capture.regions[i].first_page < end:
        region = &capture.regions[i]
        if _protect_part(capture, lane, region, max(first, region.first_page),
                         min(end, region.first_page + region.pages)):
            return
        i += 1
