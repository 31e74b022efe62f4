"""The walk: saves, in order, every page that was not saved by a write fault first.

Walkers take units of 2 MiB from one counter and save the unclaimed pages in them. A row of units that held
nothing at T is taken at once and recorded as one hole. There are two ways to save a unit:

- While writers fault: in runs of 64 pages, each released at once, so that a writer that faults on a page
  which the walk has claimed waits for one short copy.
- While no writer faults: the unit as a whole, released by one UFFDIO_UNREGISTER. That clears the protection
  as UFFDIO_WRITEPROTECT would (per GiB of 4 KiB pages: 30 ms, against 37 ms in runs of 64), and leaves
  nothing to unregister at the end (which takes 27 ms more).

Units of an attached process are not unregistered: such a unit becomes a mapping of its own, and an mremap()
of a range that crosses its edge fails (EFAULT). A target that cooperates does not move the memory it handed
over.

Unregistering releases every page of the unit, so it requires `saved` of every page: a page that a fault
thread has claimed and still copies keeps the unit registered.
"""

from libc.stdint cimport uint64_t

from snapengine.base.atomics cimport snap_fetch_or, snap_load, snap_load_relaxed, snap_swap_if
from snapengine.base.bitmap cimport bits_claim, bits_mask, bits_next, bits_test
from snapengine.image.format cimport SNAP_ENTRY_MAX_PAGES, SNAP_HOLE
from snapengine.engine.polling cimport poll_faults, stop_polling
from snapengine.engine.parallel cimport first_region
from snapengine.pipeline.pool cimport lane_pages, lane_room, lane_waits, pool_await, pool_has_room
from snapengine.base.pthreads cimport snap_sleep_ns
from snapengine.engine.save cimport claim_unit, copy_claimed, publish, release, save_unit, unit_of
from snapengine.engine.state cimport capture_fail, note_filled, page_addr, region_by_addr, region_t
from snapengine.engine.source cimport copy_run, populated, put_pages
from snapengine.kernel.uffd cimport uffd_unregister

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef uint64_t PAGE = 4096
cdef uint64_t UNIT_PAGES = 512
cdef uint64_t FAULT_CHECK_NS = 500000
cdef uint64_t FAULT_CHECK_MAX_NS = 4000000


cdef bint _shared_with_another(capture_t *capture, int place, uint64_t addr) noexcept nogil:
    """Whether another region than the one at `place` has bytes in the page at `addr`. Such a region is a
    neighbour by address."""
    cdef region_t *other
    cdef int at
    for at in range(max(place - 1, 0), min(place + 2, capture.n_regions)):
        other = region_by_addr(capture, at)
        if at != place and other.addr <= addr < other.addr + other.pages * PAGE:
            return True
    return False


cdef uint64_t _edge_page(region_t *region, int which, uint64_t *addr) noexcept nogil:
    """Page number and address of the region's first or last page."""
    cdef uint64_t page = region.first_page + (region.pages - 1 if which else 0)
    addr[0] = page_addr(region, page)
    return page


cdef void claim_shared_pages(capture_t *capture) noexcept nogil:
    """A page can hold the end of one region and the beginning of another. If it were unprotected once it is
    saved for one region, the bytes of the other could change. So such pages are claimed before any fault is
    served, and writers that fault on one wait."""
    cdef int i, which
    cdef uint64_t page, addr
    for i in range(capture.n_regions):
        for which in range(2):
            page = _edge_page(region_by_addr(capture, i), which, &addr)
            if _shared_with_another(capture, i, addr):
                bits_claim(capture.claimed, page >> 6, <uint64_t>1 << (page & 63))
                note_filled(capture, page, 1)


cdef int save_shared_pages(capture_t *capture, lane_t *lane) noexcept nogil:
    """All shared pages are copied for every region first. Only then are they set as saved, and released."""
    cdef int i, which, err
    cdef uint64_t page, addr, bit
    cdef region_t *region
    for i in range(capture.n_regions):
        region = region_by_addr(capture, i)
        for which in range(2):
            page = _edge_page(region, which, &addr)
            if not _shared_with_another(capture, i, addr) or (which and region.pages == 1):
                continue
            bit = <uint64_t>1 << (page & 63)
            err = lane_room(capture.pool, &lane.slot, 1, False)
            if not err and populated(capture, lane, region, page & ~<uint64_t>63, bit):
                err = copy_run(capture, lane, region, page, 1)
            elif not err:
                put_pages(capture, lane, page, 1, SNAP_HOLE)
            if err:
                capture_fail(capture, err, "copy of a shared page", addr)
                return err
    for i in range(capture.n_regions):
        for which in range(2):
            page = _edge_page(region_by_addr(capture, i), which, &addr)
            if _shared_with_another(capture, i, addr):
                bits_claim(capture.saved, page >> 6, <uint64_t>1 << (page & 63))
    for i in range(capture.n_regions):
        for which in range(2):
            _edge_page(region_by_addr(capture, i), which, &addr)
            if _shared_with_another(capture, i, addr):
                release(capture, lane, 0, addr, PAGE)
    return 0


cdef bint _no_new_faults(capture_t *capture, lane_t *lane) noexcept nogil:
    """Whether no fault was served since this walker's last call."""
    cdef uint64_t faults = 0
    cdef int i
    cdef bint no_faults
    for i in range(capture.n_fault_lanes + 1):
        faults += snap_load_relaxed(&capture.lanes[i].faults)
    no_faults = lane.has_faults_seen and faults == lane.faults_seen
    lane.has_faults_seen = True
    lane.faults_seen = faults
    return no_faults


cdef bint _fully_populated(capture_t *capture, lane_t *lane, region_t *region, uint64_t page) noexcept nogil:
    """Whether the unit at `page` lies completely inside the region, and every page of it was populated at
    T."""
    cdef uint64_t word
    if page & (UNIT_PAGES - 1) or page + UNIT_PAGES > region.first_page + region.pages:
        return False
    for word in range(page, page + UNIT_PAGES, 64):
        if populated(capture, lane, region, word, <uint64_t>-1) != <uint64_t>-1:
            return False
    return True


cdef int _save_runs(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                    uint64_t *won) noexcept nogil:
    """Copy the pages in `won`, in runs as long as the slot has room for."""
    cdef uint64_t first = 0
    cdef uint64_t n, part
    cdef int err
    while first < UNIT_PAGES:
        if not bits_test(won, first):
            first += 1
            continue
        n = 1
        while first + n < UNIT_PAGES and bits_test(won, first + n):
            n += 1
        while n:
            err = lane_room(capture.pool, &lane.slot, 1, False)
            if err:
                capture_fail(capture, err, "spill file", 0)
                return err
            part = min(n, lane_pages(capture.pool, &lane.slot))
            err = copy_run(capture, lane, region, page + first, part)
            if err:
                capture_fail(capture, err, "reading the target", page_addr(region, page + first))
                return err
            first += part
            n -= part
    return 0


cdef void _release_unit(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                        uint64_t *won) noexcept nogil:
    cdef uint64_t addr = page_addr(region, page)
    cdef uint64_t i
    cdef uint64_t first = 0
    cdef uint64_t n
    for i in range(8):
        if capture.attached or snap_load(&capture.saved[(page >> 6) + i]) != <uint64_t>-1:
            break
    else:
        if uffd_unregister(capture.uffds[0], addr, UNIT_PAGES * PAGE) == 0:
            snap_fetch_or(&capture.unregistered[page >> 15], <uint64_t>1 << (page >> 9 & 63))
            return
    while first < UNIT_PAGES:
        n = 0
        while first + n < UNIT_PAGES and bits_test(won, first + n):
            n += 1
        if n:
            release(capture, lane, 0, addr + first * PAGE, n * PAGE)
        first += n + 1


cdef int _save_whole_unit(capture_t *capture, lane_t *lane, region_t *region, uint64_t page) noexcept nogil:
    cdef uint64_t won[8]
    cdef uint64_t i
    for i in range(8):
        won[i] = bits_claim(capture.claimed, (page >> 6) + i, <uint64_t>-1)
    if _save_runs(capture, lane, region, page, won):
        return 1
    for i in range(8):
        snap_fetch_or(&capture.saved[(page >> 6) + i], won[i])
    _release_unit(capture, lane, region, page, won)
    return 0


cdef int _copy_polling(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t won,
                       uint64_t data) noexcept nogil:
    """Copy in parts, with a poll for faults between two parts. Pages of the faults go into the same slot."""
    cdef uint64_t size = capture.polling.every_pages
    cdef uint64_t first = 0
    cdef uint64_t part
    cdef int err
    cdef bint again = False
    while first < 64:
        part = won & bits_mask(first, size)
        first += size
        if not part:
            continue
        if again:
            poll_faults(capture, lane)
            err = lane_room(capture.pool, &lane.slot, size, False)
            if err:
                capture_fail(capture, err, "spill file", 0)
                return err
        err = copy_claimed(capture, lane, region, page, part, data & part)
        if err:
            return err
        again = True
    return 0


cdef int _save_windows(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t end,
                       bint polls) noexcept nogil:
    cdef uint64_t n, mask, data, won
    cdef uint64_t window
    cdef int err
    while page < end:
        if polls:
            poll_faults(capture, lane)
        if lane.index == 0 and lane_waits(capture.pool, &lane.slot, 64):
            stop_polling(capture)
        err = lane_room(capture.pool, &lane.slot, 64, True)
        if err:
            capture_fail(capture, err, "queue", 0)
        if snap_load(&capture.failed):
            return 1
        n = min(64 - (page & 63), end - page)
        mask = bits_mask(page & 63, n)
        window = page & ~<uint64_t>63
        data = populated(capture, lane, region, window, mask)
        won = bits_claim(capture.claimed, page >> 6, mask)
        data &= won
        if won:
            if polls:
                err = _copy_polling(capture, lane, region, window, won, data)
            else:
                err = copy_claimed(capture, lane, region, window, won, data)
            if err:
                return 1
            publish(capture, lane, region, window, won, data)
        page += n
    return 0


cdef int _walk_unit(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                    uint64_t end) noexcept nogil:
    cdef uint64_t first, n
    cdef int err
    cdef bint no_faults = _no_new_faults(capture, lane)
    cdef bint polls
    unit_of(capture, region, page, &first, &n)
    polls = lane.index == 0 and n == 1 and not no_faults and capture.polling.every_pages != 0
    if lane.index == 0 and not polls:
        stop_polling(capture)
    if n > 1:
        # Wait for enough slots for whole units of all walkers. A claimed unit does not wait for the sink:
        # pages without a slot go to the spill file.
        pool_await(capture.pool, (n * PAGE // capture.pool.slot_bytes + 1)
                   * <uint64_t>(capture.n_lanes - capture.n_fault_lanes - 1))
        err = lane_room(capture.pool, &lane.slot, 64, True)
        if err:
            capture_fail(capture, err, "queue", 0)
        if snap_load(&capture.failed):
            return 1
        return claim_unit(capture, first, n) and save_unit(capture, lane, region, first, n)
    # Check the room first: a claimed unit must neither wait for the sink nor go to the spill file.
    if no_faults and pool_has_room(capture.pool, 3) and _fully_populated(capture, lane, region, page):
        return _save_whole_unit(capture, lane, region, page)
    return _save_windows(capture, lane, region, page, end, polls)


cdef void _await_no_faults(capture_t *capture, lane_t *lane) noexcept nogil:
    """While writers fault, one walker is enough. A second would take the CPU that a released writer needs
    (two CPUs, 256 MiB at full speed: p99 of a stall 460 µs). Even this check needs the CPU, so its interval
    doubles up to FAULT_CHECK_MAX_NS."""
    cdef uint64_t nap = FAULT_CHECK_NS
    while not _no_new_faults(capture, lane) and not snap_load(&capture.failed) \
            and snap_load_relaxed(&capture.next_unit) * UNIT_PAGES < capture.page_end:
        snap_sleep_ns(nap)
        nap = min(2 * nap, FAULT_CHECK_MAX_NS)


cdef region_t *_take_units(capture_t *capture, uint64_t *page, uint64_t *end) noexcept nogil:
    """Take the next unit that may hold something, or the row of empty units before it, within one region:
    [page, end). NULL: no unit is left. Regions are in ascending order of page numbers, and no two regions
    share a unit."""
    cdef uint64_t taken, unit, after
    cdef region_t *region
    cdef int i
    while True:
        taken = snap_load_relaxed(&capture.next_unit)
        i = first_region(capture, taken * UNIT_PAGES)
        if i == capture.n_regions:
            return NULL
        region = &capture.regions[i]
        unit = max(taken, region.first_page // UNIT_PAGES)
        end[0] = region.first_page + region.pages
        after = unit + 1
        if not bits_test(capture.filled, unit):
            after = bits_next(capture.filled, unit, (end[0] + UNIT_PAGES - 1) // UNIT_PAGES)
        if snap_swap_if(&capture.next_unit, taken, after):
            page[0] = max(unit * UNIT_PAGES, region.first_page)
            end[0] = min(after * UNIT_PAGES, end[0])
            return region


cdef int _put_holes(capture_t *capture, lane_t *lane, uint64_t page, uint64_t end) noexcept nogil:
    """Units that held nothing at T. Their pages are not claimed: a fault there is released at once."""
    cdef uint64_t n
    cdef int err
    while page < end and not snap_load(&capture.failed):
        n = min(end - page, <uint64_t>SNAP_ENTRY_MAX_PAGES)
        if lane.index == 0 and lane_waits(capture.pool, &lane.slot, 1):
            stop_polling(capture)
        err = lane_room(capture.pool, &lane.slot, 1, True)
        if err:
            capture_fail(capture, err, "queue", 0)
            return err
        put_pages(capture, lane, page, n, SNAP_HOLE)
        page += n
    return 0


cdef void _walk_units(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef uint64_t page = 0
    cdef uint64_t end = 0
    cdef int err
    cdef region_t *region
    while not snap_load(&capture.failed):
        if lane.index:
            _await_no_faults(capture, lane)
        sched_yield()
        region = _take_units(capture, &page, &end)
        if region == NULL:
            return
        if bits_test(capture.filled, page // UNIT_PAGES):
            err = _walk_unit(capture, lane, region, page, end)
        else:
            err = _put_holes(capture, lane, page, end)
        if err:
            return


cdef void walk(capture_t *capture, lane_t *lane) noexcept nogil:
    _walk_units(capture, lane)
    if lane.index == 0:
        stop_polling(capture)
