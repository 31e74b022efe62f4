"""Dirty logging: copy all pages, find the pages written meanwhile, copy those again, … and pause for the
rest.

The kernel clears the protection itself when a page is written (UFFD_FEATURE_WP_ASYNC), so no writer waits.
PAGEMAP_SCAN returns the written pages and protects them again in one step. A page is copied after it was
protected again: a write during the copy makes it dirty for the next round.

Three changes of memory leave its protection as it was, so that no scan reports them:

- A page is punched out of shared memory and touched again. `pyx/engine/missing` fills it, so that it counts
  as written.
- The same with huge pages of a file. Their shadow mapping loses the page (`pyx/engine/recheck`).
- A private page of a memory file is discarded, and the file shows through again (`pyx/engine/dirty_pages`).

Runs on the caller's thread alone, without the GIL while it scans and copies. Source: Linux 6.7,
Documentation/admin-guide/mm/pagemap.rst.
"""

from libc.errno cimport ESRCH, ETIMEDOUT
from libc.stdint cimport int64_t, uint64_t

from snapengine.base.atomics cimport snap_load, snap_store
from snapengine.base.nofault cimport guard_thread
from snapengine.base.pthreads cimport snap_now_ns
from snapengine.engine.arming cimport register_region
from snapengine.engine.dirty_pages cimport (
    copy_discarded, copy_pages, copy_punched, copy_written, count_written, put_holes,
)
from snapengine.engine.events cimport close_all
from snapengine.engine.missing cimport start_missing, stop_missing
from snapengine.engine.populated cimport rescan_all
from snapengine.engine.session cimport Session
from snapengine.engine.state cimport capture_fail, capture_t, lane_t, region_t
from snapengine.kernel.linux cimport ECANCELED
from snapengine.kernel.uffd cimport uffd_protect
from snapengine.pipeline.pool cimport lane_close, lane_open, pool_finish

cdef double WANTED_SECONDS = 0.05   # between rounds that only keep the remainder small
cdef uint64_t PAGE = 4096
cdef uint64_t MIB_PAGES = 256
cdef uint64_t PIECE = 1 << 30       # bytes protected by one call: writing their markers takes 5 ms


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
                    err = copy_punched(capture, lane, region, True, self.deadline)
                if region.shared and not err:
                    err = copy_pages(capture, lane, region, region.first_page,
                                     region.first_page + region.pages, True, self.deadline)
                if not err and (not region.shared or region.sparse):
                    err = copy_written(capture, lane, region, True, self.deadline)
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
                    err = copy_punched(capture, &capture.lanes[0], &capture.regions[i], wait, deadline)
                err = err or copy_written(capture, &capture.lanes[0], &capture.regions[i], wait, deadline)
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
                    err = err or copy_discarded(capture, lane, &capture.regions[i])
                err = err or put_holes(capture, lane, &capture.regions[i])
        return err

    cdef int64_t _dirty_pages(self) except -1:
        """Pages written since they were copied, counted without protecting them again."""
        cdef capture_t *capture = self.session.capture
        cdef uint64_t pages = 0
        cdef int i, err
        with nogil:
            for i in range(capture.n_regions):
                err = count_written(capture, &capture.lanes[0], &capture.regions[i], &pages)
                if err:
                    capture_fail(capture, err, "PAGEMAP_SCAN", capture.regions[i].addr)
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
            pool_finish(capture.pool)
            snap_store(&capture.finished, 1)
