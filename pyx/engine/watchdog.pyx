"""The watchdog: a thread that never waits for the target, and serves faults when no other thread can.

- A fault thread that reads a page which the target has just discarded takes a missing fault itself. Another
  fault thread serves it. If all of them read such pages at the same time, the watchdog serves them, so that
  no target can hang the engine or itself.
- While the first walker polls for faults (`pyx/engine/polling`), the fault threads sleep. If its poll is
  overdue, since it reads such a page or gets no CPU, the watchdog wakes the fault threads.
"""

from libc.stdint cimport uint64_t

from snapengine.base.atomics cimport snap_decrement, snap_load
from snapengine.base.bitmap cimport bits_test
from snapengine.engine.events cimport drain_events
from snapengine.engine.fault_threads cimport await_arming, fill_missing
from snapengine.kernel.linux cimport UFFD_PAGEFAULT_FLAG_WP
from snapengine.engine.polling cimport wake_if_overdue
from snapengine.base.poll cimport POLLIN, poll, pollfd
from snapengine.base.pthreads cimport snap_name_thread, snap_now_ns
from snapengine.engine.state cimport PRESENCE_BITS, capture_t, lane_t, page_at, region_at, region_t
from snapengine.kernel.uffd cimport uffd_wake

cdef uint64_t PAGE = 4096
cdef uint64_t STUCK_NS = 20000000
cdef int TICK_MS = 10
cdef int POLL_TICK_MS = 2           # where the first walker may poll for faults


cdef bint _all_stuck(capture_t *capture) noexcept nogil:
    cdef int i
    cdef uint64_t since
    cdef uint64_t now = snap_now_ns()
    for i in range(1, capture.n_fault_lanes + 1):
        since = snap_load(&capture.lanes[i].busy_since)
        if since == 0 or now - since < STUCK_NS:
            return False
    return True


cdef void _watch_until_stopped(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef region_t *region
    cdef pollfd stop
    cdef uint64_t addr, uffd, page
    cdef int tick = POLL_TICK_MS if capture.polling.every_pages else TICK_MS
    snap_name_thread("snap-watchdog")
    if not await_arming(capture, False):
        return
    stop.fd = capture.stop_event
    stop.events = POLLIN
    while not snap_load(&capture.stopping):
        if poll(&stop, 1, tick) != 0:
            continue
        wake_if_overdue(capture)
        if not _all_stuck(capture):
            continue
        drain_events(capture, lane)
        while lane.n_deferred:
            lane.n_deferred -= 1
            addr = lane.deferred[lane.n_deferred].arg.pagefault.address & ~(PAGE - 1)
            uffd = lane.deferred_uffd[lane.n_deferred]
            region = region_at(capture, addr)
            page = page_at(region, addr) if region != NULL else 0
            if not lane.deferred[lane.n_deferred].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP and (
                    region == NULL or region.presence == PRESENCE_BITS or bits_test(capture.claimed, page)):
                fill_missing(capture, lane, uffd, addr)
            else:
                uffd_wake(capture.uffds[uffd], addr, PAGE)   # it faults again: fault threads get the message


cdef void *watchdog_thread(void *arg) noexcept nogil:
    cdef lane_t *lane = <lane_t *>arg
    _watch_until_stopped(lane.capture, lane)
    snap_decrement(&lane.capture.running)
    return NULL
