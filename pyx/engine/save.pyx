"""Saving claimed pages: copy, publish as saved, release. Used by walkers and fault threads.

The correctness of write tracking is this order: claim (0→1, one winner) → copy → `saved` (release store) →
unprotect. A page is unprotected by the thread that copied it, or by a thread that has seen `saved` (acquire).
If a thread stops after its claim, the page stays protected and its writers wait; no other thread releases it.
"""

from libc.errno cimport EAGAIN, ENOENT, ESRCH

from snapengine.base.atomics cimport snap_clz, snap_ctz, snap_fetch_or, snap_load
from snapengine.base.bitmap cimport bits_claim, bits_mask, bits_run, bits_test
from snapengine.engine.events cimport drain_events
from snapengine.engine.watch cimport wake_fault_threads
from snapengine.image.format cimport SNAP_HOLE
from snapengine.pipeline.pool cimport lane_room
from snapengine.base.pthreads cimport snap_sleep_ns
from snapengine.engine.state cimport PRESENCE_BITS, capture_fail, page_addr
from snapengine.engine.source cimport copy_run, copy_window, put_pages
from snapengine.kernel.uffd cimport uffd_unprotect, uffd_wake

cdef uint64_t PAGE = 4096
cdef uint64_t RUN = 64              # pages copied between two requests for room in the pool


cdef void unit_of(capture_t *capture, region_t *region, uint64_t page, uint64_t *first,
                  uint64_t *n) noexcept nogil:
    cdef uint64_t size = region.unit_pages
    cdef uint64_t begin, end
    if size == 1:
        if not region.keep_huge or not bits_test(capture.huge, page >> 9):
            first[0] = page
            n[0] = 1
            return
        size = 512
    begin = page & ~(size - 1)
    end = min(begin + size, region.first_page + region.pages)
    first[0] = max(begin, region.first_page)
    n[0] = end - first[0]


cdef void unit_range(region_t *region, uint64_t first, uint64_t n, uint64_t *addr,
                     uint64_t *length) noexcept nogil:
    cdef uint64_t size = region.unit_pages
    if size > 1:
        addr[0] = page_addr(region, first) & ~(size * PAGE - 1)
        length[0] = size * PAGE
    else:
        addr[0] = page_addr(region, first)
        length[0] = n * PAGE


cdef bint claim_unit(capture_t *capture, uint64_t first, uint64_t n) noexcept nogil:
    """The claim of the first page decides for the whole unit: the units are fixed at T, so all threads claim
    the same page first."""
    cdef uint64_t page, count
    if not bits_claim(capture.claimed, first >> 6, <uint64_t>1 << (first & 63)):
        return False
    page = first + 1
    while page < first + n:
        count = min(64 - (page & 63), first + n - page)
        snap_fetch_or(&capture.claimed[page >> 6], bits_mask(page & 63, count))
        page += count
    return True


cdef void release(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t addr,
                  uint64_t length) noexcept nogil:
    cdef int err
    cdef uint64_t offset
    while True:
        err = uffd_unprotect(capture.uffds[uffd], addr, length)
        if err != EAGAIN:
            break
        if snap_load(&capture.failed):
            return
        # An event is pending. Fault threads read it. After T a walker leaves that to them.
        if not lane.walks or not snap_load(&capture.armed):
            drain_events(capture, lane)
        else:
            if snap_load(&capture.polling.polled_ns):
                wake_fault_threads(capture)
            snap_sleep_ns(20000)
    if err == ENOENT and length > PAGE:
        # Part of the run has been unmapped. The rest must still be released, even while events are pending,
        # and threads that wait for an unmapped page must be woken.
        for offset in range(length // PAGE):
            release(capture, lane, uffd, addr + offset * PAGE, PAGE)
    elif err == ENOENT:
        uffd_wake(capture.uffds[uffd], addr, length)
    elif err == ESRCH:
        if uffd == 0:               # otherwise a forked child has ended, and no thread of it waits
            capture_fail(capture, ESRCH, "the target ended", addr)
    elif err:
        capture_fail(capture, err, "UFFDIO_WRITEPROTECT", addr)


cdef void _release_window(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                          uint64_t mask) noexcept nogil:
    """Release the pages in `mask`. One call is enough if all pages between them are saved, too: a thread that
    has seen that may release them. A call takes 1 µs, or 10 µs while the target runs on another CPU, whose
    TLB is flushed."""
    cdef uint64_t first = snap_ctz(mask)
    cdef uint64_t n = 64 - snap_clz(mask) - first
    if not bits_mask(first, n) & ~snap_load(&capture.saved[page >> 6]):
        release(capture, lane, 0, page_addr(region, page + first), n * PAGE)
        return
    while mask:
        n = bits_run(mask, &first)
        release(capture, lane, 0, page_addr(region, page + first), n * PAGE)
        mask &= ~bits_mask(first, n)


cdef int copy_claimed(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                      uint64_t won, uint64_t data) noexcept nogil:
    cdef uint64_t mask = won & ~data
    cdef uint64_t first, n
    cdef int err = copy_window(capture, lane, region, page, data) if data else 0
    if err:
        capture_fail(capture, err, "reading the target", page_addr(region, page + snap_ctz(data)))
        return err
    while mask:
        n = bits_run(mask, &first)
        put_pages(capture, lane, page + first, n, SNAP_HOLE)
        mask &= ~bits_mask(first, n)
    return 0


cdef void publish(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                  uint64_t won, uint64_t data) noexcept nogil:
    # A hole of private memory has no page table entry to release.
    cdef uint64_t mask = data if region.presence == PRESENCE_BITS and region.missing else won
    snap_fetch_or(&capture.saved[page >> 6], won)
    if mask:
        _release_window(capture, lane, region, page, mask)


cdef int save_window(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                     uint64_t won, uint64_t data) noexcept nogil:
    cdef int err = copy_claimed(capture, lane, region, page, won, data)
    if not err:
        publish(capture, lane, region, page, won, data)
    return err


cdef int save_unit(capture_t *capture, lane_t *lane, region_t *region, uint64_t first,
                   uint64_t n) noexcept nogil:
    cdef uint64_t page = first
    cdef uint64_t count, addr, length
    cdef bint hole = region.presence == PRESENCE_BITS and not bits_test(capture.present, first)
    cdef int err
    while page < first + n:
        count = min(RUN, first + n - page)
        # Do not wait for the sink here: the unit is claimed, and its writers may be waiting.
        err = lane_room(capture.pool, &lane.slot, RUN, False)
        if err:
            capture_fail(capture, err, "spill file", 0)
            return err
        if hole:
            put_pages(capture, lane, page, count, SNAP_HOLE)
        else:
            err = copy_run(capture, lane, region, page, count)
            if err:
                capture_fail(capture, err, "reading the target", page_addr(region, page))
                return err
        page += count
    page = first
    while page < first + n:
        count = min(64 - (page & 63), first + n - page)
        snap_fetch_or(&capture.saved[page >> 6], bits_mask(page & 63, count))
        page += count
    unit_range(region, first, n, &addr, &length)
    release(capture, lane, 0, addr, length)
    return 0
