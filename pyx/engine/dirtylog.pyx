"""Dirty logging: copy all pages, find the pages written meanwhile, copy those again, … and pause for the
rest.

The kernel clears the protection itself when a page is written (UFFD_FEATURE_WP_ASYNC), so no writer waits.
PAGEMAP_SCAN returns the written pages and protects them again in one step. A page is copied after it was
protected again: a write during the copy makes it dirty for the next round.

Three changes of memory leave its protection as it was, so that no scan reports them:

- A page is punched out of shared memory and touched again. `pyx/engine/missing` fills it, so that it counts
  as written.
- The same with huge pages of a file. Their shadow mapping loses the page (`pyx/engine/recheck`).
- A private page of a memory file is discarded, and the file shows through again (`_copy_discarded`).

Runs on the caller's thread alone, without the GIL while it scans and copies. Source: Linux 6.7,
Documentation/admin-guide/mm/pagemap.rst.
"""

from libc.errno cimport EPERM, ESRCH, ETIMEDOUT
from libc.stdint cimport int64_t, uint64_t

from snapengine.engine.arming cimport register_attached, register_region
from snapengine.base.atomics cimport snap_ctz, snap_load, snap_store
from snapengine.base.bitmap cimport bits_clear, bits_fill, bits_mask, bits_next, bits_test
from snapengine.engine.events cimport close_all
from snapengine.base.nofault cimport guard_thread
from snapengine.image.format cimport SNAP_ENTRY_MAX_PAGES, SNAP_HOLE
from snapengine.kernel.linux cimport (
    ECANCELED,
    PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING, UFFDIO_REGISTER_MODE_WP,
)
from snapengine.kernel.pagemap cimport scan_step, scan_t
from snapengine.engine.missing cimport start_missing, stop_missing
from snapengine.pipeline.pool cimport lane_close, lane_open, lane_room, pool_end
from snapengine.base.pthreads cimport pthread_mutex_lock, pthread_mutex_unlock, snap_now_ns
from snapengine.engine.session cimport Session
from snapengine.engine.state cimport capture_fail, capture_t, lane_t, note_present, region_t
from snapengine.engine.populated cimport rescan_all
from snapengine.engine.source cimport copy_run, data_from, populated, put_pages
from snapengine.engine.recheck cimport populate_shadow, drop_shadow
from snapengine.kernel.uffd cimport uffd_protect

cdef double WANTED_SECONDS = 0.05   # between rounds that only keep the remainder small
cdef uint64_t PAGE = 4096
cdef uint64_t MIB_PAGES = 256
cdef uint64_t UNIT_PAGES = 512
cdef uint64_t PIECE = 1 << 30       # bytes protected by one call: writing their markers takes 5 ms
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


cdef int _copy_pages(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t end,
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


cdef int _copy_written(capture_t *capture, lane_t *lane, region_t *region, bint wait,
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
            err = _copy_pages(capture, lane, region, start, end, wait, deadline)
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


cdef int _copy_discarded(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
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
                err = _copy_pages(capture, lane, region, page, page + 1, False, <uint64_t>-1)
                page = bits_next(capture.own_copies, page + 1, end)
            if err:
                return err


cdef int _copy_punched(capture_t *capture, lane_t *lane, region_t *region, bint wait,
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
            err = _copy_pages(capture, lane, region, page, min(page + region.unit_pages, end), wait, deadline)
        page += region.unit_pages
    return err


cdef int _put_holes(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
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
            err = _copy_pages(capture, lane, region, (page & ~<uint64_t>63) + first,
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


cdef int _protect(capture_t *capture, region_t *region) noexcept nogil:
    cdef uint64_t piece = max(PIECE, region.unit_pages * PAGE)
    cdef uint64_t start = region.track_start
    cdef int err = 0
    while start < region.track_end and not err:
        err = ECANCELED if snap_load(&capture.failed) else uffd_protect(
            capture.uffds[0], start, min(piece, region.track_end - start))
        start += piece
    return err


cdef class DirtyLog:
    """Dirty logging of one `Session`.

    `run` does all the work. `release` releases the memory, and must be called whatever the outcome of
    `run`."""

    def __init__(self, Session session not None):
        self.session = session
        self.registered = self.answering = False
        self.rate = 0

    def run(self, target, double downtime_limit, uint64_t max_rounds, double max_seconds, wanted=None):
        """Run rounds until the remaining pages can be copied within `downtime_limit` seconds at the measured
        rate, then a last round with the target paused.

        Returns ``(stop_ns, vmstate)``; vmstate is None if the rounds did not converge within `max_rounds`
        rounds or `max_seconds`. With `wanted` (a `snapengine.base.latch.Latch`) further rounds keep the
        remainder small until the latch is open. `max_rounds` does not count these rounds, `max_seconds` does.

        A failure is left in ``Session.failure``. Exceptions of the target's pause, resume and vmstate are
        raised.
        """
        cdef capture_t *capture = self.session.capture
        cdef uint64_t begin = snap_now_ns()
        cdef uint64_t waiting = 0
        cdef int64_t dirty
        self.deadline = begin + <uint64_t>(max_seconds * 1e9)
        guard_thread()
        if lane_open(capture.pool, &capture.lanes[0].slot) or self._start_missing() or self._register():
            return 0, None
        capture.arm_ns = snap_now_ns() - begin
        snap_store(&capture.armed, 1)
        if not self._run_measured(True):
            return 0, None
        while True:
            dirty = self._dirty_pages()
            if self.session.failure:
                return 0, None
            if dirty <= self.rate * downtime_limit:
                if wanted is None or wanted.is_set():
                    return self._last_round(target)
                wanted.wait(WANTED_SECONDS)
                waiting += 1
            if capture.rounds >= max_rounds + waiting or snap_now_ns() > self.deadline:
                return 0, None
            if not self._run_measured(False):
                return 0, None

    def _run_measured(self, bint first):
        """Run one round and measure its rate: pages copied per second, including waits for room."""
        cdef capture_t *capture = self.session.capture
        cdef uint64_t before = capture.lanes[0].data_pages + capture.lanes[0].zero_pages
        cdef uint64_t begin = snap_now_ns()
        cdef int err = self._first_round() if first else self._round(True)
        cdef uint64_t pages = capture.lanes[0].data_pages + capture.lanes[0].zero_pages - before
        capture.rounds += 1
        if pages >= MIB_PAGES or self.rate == 0:
            self.rate = pages / max((snap_now_ns() - begin) / 1e9, 1e-9)
        if err == ETIMEDOUT:
            return False
        if err:
            capture_fail(capture, err, "reading the target", 0)
        return not err

    def _last_round(self, target):
        cdef capture_t *capture = self.session.capture
        cdef uint64_t begin = snap_now_ns()
        cdef int err
        target.pause()
        try:
            err = self._round(False) or self._last_pages()
            capture.t_ns = snap_now_ns()
            capture.rounds += 1
            blobs = target.vmstate() if not err else None
        finally:
            target.resume()
        stop_ns = snap_now_ns() - begin
        if err:
            capture_fail(capture, err, "reading the target", 0)
        return stop_ns, blobs

    def _start_missing(self):
        """Start to answer missing faults. Non-zero if the capture has failed."""
        cdef capture_t *capture = self.session.capture
        cdef int err = start_missing(capture, &capture.lanes[1])
        self.answering = not err
        if err:
            capture_fail(capture, err, "pthread_create", 0)
        return err

    def _register(self):
        """Register and protect all regions. Non-zero if the capture has failed."""
        cdef capture_t *capture = self.session.capture
        cdef region_t *region
        cdef int i, err
        self.registered = True
        for i in range(capture.n_regions):
            region = &capture.regions[i]
            with nogil:
                err = register_region(capture, region)
                if not err:
                    capture.n_registered = i + 1
                if not err and region.shared and not region.sparse:
                    # This writes markers for pages of the file that the target has not mapped.
                    err = _protect(capture, region)
                    if err:
                        capture_fail(capture, err, "UFFDIO_WRITEPROTECT", region.track_start)
            if err:
                return err
        return 0

    cdef int _first_round(self) except -1:
        """Copy all populated pages. Pages of shared memory are found by the file, since the page tables do
        not list them all. Private pages are found by the same scan as in later rounds: unprotected pages
        count as written."""
        cdef capture_t *capture = self.session.capture
        cdef lane_t *lane = &capture.lanes[0]
        cdef region_t *region
        cdef int i
        cdef int err = 0
        with nogil:
            for i in range(capture.n_regions):
                region = &capture.regions[i]
                if region.shadow != NULL:
                    err = _copy_punched(capture, lane, region, True, self.deadline)
                if region.shared and not err:
                    err = _copy_pages(capture, lane, region, region.first_page,
                                      region.first_page + region.pages, True, self.deadline)
                if not err and (not region.shared or region.sparse):
                    err = _copy_written(capture, lane, region, True, self.deadline)
                if err:
                    break
        return err

    cdef int _round(self, bint wait) except -1:
        cdef capture_t *capture = self.session.capture
        cdef int i
        cdef int err = 0
        cdef uint64_t deadline = self.deadline if wait else <uint64_t>-1
        with nogil:
            for i in range(capture.n_regions):
                if capture.regions[i].shadow != NULL:
                    err = _copy_punched(capture, &capture.lanes[0], &capture.regions[i], wait, deadline)
                err = err or _copy_written(capture, &capture.lanes[0], &capture.regions[i], wait, deadline)
                if err:
                    break
        return err

    cdef int _last_pages(self) except -1:
        cdef capture_t *capture = self.session.capture
        cdef lane_t *lane = &capture.lanes[0]
        cdef int i
        cdef int err = 0
        with nogil:
            lane.extent_region = NULL
            err = rescan_all(capture, lane)
            for i in range(capture.n_regions):
                if capture.regions[i].own:
                    err = err or _copy_discarded(capture, lane, &capture.regions[i])
                err = err or _put_holes(capture, lane, &capture.regions[i])
        return err

    cdef int64_t _dirty_pages(self) except -1:
        """Pages written since they were copied, counted without protecting them again."""
        cdef capture_t *capture = self.session.capture
        cdef scan_t *scan = &capture.lanes[0].scan
        cdef int64_t pages = 0
        cdef int64_t before
        cdef int i, j, found
        with nogil:
            for i in range(capture.n_regions):
                before = pages
                _setup_scan(capture, &capture.regions[i], scan, False)
                while True:
                    found = _step(capture, scan)
                    if found < 0 and scan.err == EPERM and capture.attached:
                        _track_again(capture, &capture.regions[i])
                        _setup_scan(capture, &capture.regions[i], scan, False)
                        scan.flags = 0          # memory that cannot be tracked counts as written
                        pages = before
                        continue
                    if found <= 0:
                        break
                    for j in range(found):
                        pages += (scan.found[j].end - scan.found[j].start) // PAGE
                if found < 0:
                    capture_fail(capture, scan.err, "PAGEMAP_SCAN", capture.regions[i].addr)
                    return 0
        return pages

    def release(self):
        """Unregister everything and close the queue. Idempotent."""
        cdef capture_t *capture = self.session.capture
        if self.answering:
            self.answering = False
            with nogil:
                stop_missing(capture, &capture.lanes[1])
        if self.registered:
            self.registered = False
            with nogil:
                close_all(capture, &capture.lanes[0])
        with nogil:
            if lane_close(capture.pool, &capture.lanes[0].slot):
                capture_fail(capture, ESRCH, "queue", 0)
            pool_end(capture.pool)
            snap_store(&capture.finished, 1)
