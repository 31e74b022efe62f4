"""Fault threads: when a write hits a page that is not saved yet, they save it first, out of order.

Before T nothing is saved. With two-step arming a fault is recorded and released ("pre-arming",
`pyx/engine/prearm`) until the first walker ends pre-arming to fix T. From then on, and without two-step
arming from the start, faults wait for T. (If a page were saved and its writer released before T, the writer
could go on to write to memory that is not protected yet, and the image would hold the later write without the
earlier one.) Fault threads never wait for the sink, the encoders or the GIL.

While the first walker polls for faults (`pyx/engine/polling`), it serves them by the same functions.
"""

from libc.errno cimport EAGAIN, ENOMEM, ESRCH

from snapengine.base.atomics cimport (
    snap_add, snap_add_one_writer, snap_decrement, snap_load, snap_load_relaxed, snap_pause, snap_store,
    snap_store_seq,
)
from snapengine.base.bitmap cimport bits_claim, bits_mask, bits_test
from snapengine.engine.events cimport defer_fault, drain_events, handle_event, read_messages
from snapengine.engine.watch cimport WATCH_PID, WATCH_STOP, wake_fault_threads
from snapengine.base.histogram cimport histogram_add
from snapengine.engine.prearm cimport may_serve, prearm_fault
from snapengine.image.format cimport SNAP_HOLE, SNAP_LOST
from snapengine.kernel.linux cimport (
    UFFD_EVENT_PAGEFAULT, UFFD_PAGEFAULT_FLAG_WP, UFFDIO_REGISTER_MODE_WP, uffd_msg,
)
from snapengine.pipeline.pool cimport lane_room
from snapengine.base.pthreads cimport (
    pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock, snap_name_thread, snap_nice_slice,
    snap_now_ns,
)
from snapengine.engine.readaround cimport run_around
from snapengine.engine.save cimport claim_unit, publish, release, save_unit, save_window, unit_of, unit_range
from snapengine.engine.state cimport PRESENCE_BITS, capture_fail, page_at, region_at, region_t
from snapengine.engine.source cimport populated, put_pages
from snapengine.engine.recheck cimport is_late, note_missing
from snapengine.kernel.uffd cimport uffd_register, uffd_unregister, uffd_wake, uffd_zeropage

cdef extern from "engine/controls.h" nogil:
    bint snap_control(bint on)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int epoll_wait(int epfd, epoll_event *events, int n, int timeout_ms)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    const int EPOLL_CTL_DEL

cdef uint64_t PAGE = 4096
cdef int SPINS = 10000
# The limit of `capture.late`: if the mapping does not show the file, such a page would fault again for ever.
cdef uint64_t LATE_MAX = 1024
# A fault thread runs for microseconds at a time while a writer waits for it. It should not queue behind a
# walker or an encoder.
cdef int FAULT_NICE = -15
cdef uint64_t FAULT_SLICE_NS = 100000


cdef void _leave_to_kernel(capture_t *capture, uint64_t uffd, uint64_t addr) noexcept nogil:
    """The file system is full, or a cgroup has reached its limit. Without write tracking the kernel would
    reclaim memory, or raise SIGBUS in the writer; with it the page would fault again for ever. So the page is
    registered for write faults only. It must be unregistered first, since the kernel does not accept a
    smaller mode (Linux 6.18). Filling the page is then seen as a write. The lock is held because dirty
    logging scans under it."""
    cdef int fd = capture.uffds[uffd]
    cdef int err = 0
    pthread_mutex_lock(&capture.lock)
    if uffd_unregister(fd, addr, PAGE) == 0:
        err = uffd_register(fd, addr, PAGE, UFFDIO_REGISTER_MODE_WP)
    pthread_mutex_unlock(&capture.lock)
    if err and uffd == 0:               # later writes to the page would not be tracked
        capture_fail(capture, err, "UFFDIO_REGISTER", addr)
    uffd_wake(fd, addr, PAGE)


cdef void fill_missing(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t addr) noexcept nogil:
    cdef int err
    note_missing(capture, addr)
    while True:
        err = uffd_zeropage(capture.uffds[uffd], addr, PAGE, 0, NULL)
        if err != EAGAIN:
            break
        if snap_load(&capture.failed):
            uffd_wake(capture.uffds[uffd], addr, PAGE)
            return
        drain_events(capture, lane)
    if err == ESRCH:
        if uffd == 0:
            capture_fail(capture, ESRCH, "the target ended", addr)
    elif err == ENOMEM:
        _leave_to_kernel(capture, uffd, addr)
    elif err:
        # EEXIST: another thread has filled it. On any other error the writer tries again.
        uffd_wake(capture.uffds[uffd], addr, PAGE)


cdef void _serve_missing(capture_t *capture, lane_t *lane, uint64_t uffd, region_t *region, uint64_t page,
                         uint64_t addr) noexcept nogil:
    cdef uint64_t bit = <uint64_t>1 << (page & 63)
    cdef int err
    # Private memory: `present` says which pages were holes at T, and the walk records them. Shared memory:
    # once the page exists, the file no longer shows that it was a hole, so the hole is claimed and recorded
    # here. A page that exists in the file does not raise a missing fault. So the page was a hole at T, or has
    # been punched out since. A unit that was a hole as a whole is recorded by the walk.
    if region.presence != PRESENCE_BITS and bits_test(capture.filled, page >> 9) \
            and not bits_test(capture.claimed, page):
        if snap_load_relaxed(&capture.late) < LATE_MAX and is_late(region, page):
            snap_add(&capture.late, 1)
            uffd_wake(capture.uffds[uffd], addr, PAGE)      # it faults again if the page is missing
            return
        err = lane_room(capture.pool, &lane.slot, 1, False)
        if err:
            capture_fail(capture, err, "spill file", 0)
        elif bits_claim(capture.claimed, page >> 6, bit):
            put_pages(capture, lane, page, 1, SNAP_LOST if bits_test(capture.present, page) else SNAP_HOLE)
            publish(capture, lane, region, page & ~<uint64_t>63, bit, 0)
    fill_missing(capture, lane, uffd, addr)


cdef void _prearm(capture_t *capture, lane_t *lane, uint64_t uffd, region_t *region, uint64_t page,
                  uint64_t addr, bint missing) noexcept nogil:
    """A fault before T. The page is recorded before it is released: after that it may be written to."""
    cdef uint64_t first, n, start, length
    prearm_fault(capture, region, page, &first, &n)
    snap_add_one_writer(&lane.arming_faults, 1)
    if missing:
        fill_missing(capture, lane, uffd, addr)
        return
    unit_range(region, first, n, &start, &length)
    release(capture, lane, uffd, start, length)


cdef bint _save_run(capture_t *capture, lane_t *lane, region_t *region, uint64_t page) noexcept nogil:
    """Save the page of a fault, and the pages that read-around adds. True if the capture has failed."""
    cdef uint64_t window = page & ~<uint64_t>63
    cdef uint64_t first, n, mask, data, won
    cdef int err
    run_around(capture, lane, region, page, &first, &n)
    err = lane_room(capture.pool, &lane.slot, n, False)
    if err:
        capture_fail(capture, err, "spill file", 0)
        return True
    mask = bits_mask(first & 63, n)
    data = populated(capture, lane, region, window, mask & ~snap_load(&capture.claimed[page >> 6]))
    won = bits_claim(capture.claimed, page >> 6, mask)
    if won:
        save_window(capture, lane, region, window, won, data & won)
    return False


cdef void _serve_write(capture_t *capture, lane_t *lane, uint64_t uffd, region_t *region,
                       uint64_t page) noexcept nogil:
    cdef uint64_t first, n, addr, length
    cdef int spins = SPINS if lane.serving else 0   # a serving walker may itself hold the page's claim
    unit_of(capture, region, page, &first, &n)
    unit_range(region, first, n, &addr, &length)
    # A unit that held nothing at T has nothing to save: a child's marker, or a page that has moved there.
    if snap_load(&capture.failed) or not bits_test(capture.filled, first >> 9):
        release(capture, lane, uffd, addr, length)
        return
    if not bits_test(capture.claimed, first):
        if n > 1 and lane.serving:
            # Saving the unit copies 2 MiB or more, while this walker may hold claimed pages: leave it to the
            # fault threads.
            wake_fault_threads(capture)
            uffd_wake(capture.uffds[uffd], addr, length)    # it faults again
            return
        if n == 1 and _save_run(capture, lane, region, first):
            return
        if n > 1 and claim_unit(capture, first, n):
            save_unit(capture, lane, region, first, n)
    if uffd:
        # No other thread releases a child's page. The thread that claimed it is copying it, and normally
        # waits for nothing. The wait is limited all the same: that thread may itself need an answer to a
        # fault that this thread has deferred.
        while not bits_test(capture.saved, first) and not snap_load(&capture.failed) and spins < SPINS:
            snap_pause()
            spins += 1
        if spins < SPINS:
            release(capture, lane, uffd, addr, length)
        else:
            uffd_wake(capture.uffds[uffd], addr, length)    # it faults again
    elif bits_test(capture.saved, first):
        # Another thread saved it, perhaps before this message was read. Releasing it again is harmless.
        release(capture, lane, 0, addr, length)
    # else: the thread that copies the page releases it, and wakes all waiting threads.


cdef void _serve(capture_t *capture, lane_t *lane, uint64_t uffd, const uffd_msg *message) noexcept nogil:
    cdef uint64_t addr = message.arg.pagefault.address & ~(PAGE - 1)
    cdef bint missing = not message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP
    cdef region_t *region = region_at(capture, addr)
    cdef uint64_t page
    if region == NULL:
        # The target itself registered or moved this memory, it is not part of the capture: release the
        # writer.
        if missing:
            fill_missing(capture, lane, uffd, addr)
        elif capture.attached:
            # The page has moved here. The thread that read the event unregisters it, after the page has been
            # invalidated at its old place.
            uffd_wake(capture.uffds[uffd], addr, PAGE)
        else:
            release(capture, lane, uffd, addr, PAGE)
        return
    page = page_at(region, addr)
    snap_add(&capture.pool.faults_served, 1)
    if not snap_load(&capture.armed) and not snap_control(capture.serve_before_t):
        _prearm(capture, lane, uffd, region, page, addr, missing)
    elif missing:
        _serve_missing(capture, lane, uffd, region, page, addr)
    else:
        _serve_write(capture, lane, uffd, region, page)


cdef void serve_deferred(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef uffd_msg message
    while lane.n_deferred and may_serve(capture):
        lane.n_deferred -= 1
        message = lane.deferred[lane.n_deferred]
        _serve(capture, lane, lane.deferred_uffd[lane.n_deferred], &message)


cdef void _serve_or_defer(capture_t *capture, lane_t *lane, uint64_t uffd, const uffd_msg *message,
                          uint64_t seen) noexcept nogil:
    if not may_serve(capture):
        defer_fault(capture, lane, uffd, message)
        return
    _serve(capture, lane, uffd, message)
    if snap_load(&capture.armed) or snap_control(capture.serve_before_t):
        snap_add_one_writer(&lane.faults, 1)
        histogram_add(&lane.histogram, snap_now_ns() - seen)


cdef bint serve_round(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t seen) noexcept nogil:
    cdef uffd_msg messages[64]
    cdef int i
    cdef int n = read_messages(capture, capture.uffds[uffd], messages)
    # Events first: while one waits, nothing can be released.
    for i in range(n):
        if messages[i].event != UFFD_EVENT_PAGEFAULT:
            handle_event(capture, uffd, &messages[i])
    lane.waiting = n
    for i in range(n):
        if messages[i].event == UFFD_EVENT_PAGEFAULT:
            _serve_or_defer(capture, lane, uffd, &messages[i], seen)
    return n > 0


cdef void _serve_uffd(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t seen) noexcept nogil:
    while serve_round(capture, lane, uffd, seen):
        seen = snap_now_ns()
        snap_store(&lane.busy_since, seen)


cdef void answer_missing(capture_t *capture, lane_t *lane) noexcept nogil:
    drain_events(capture, lane)
    while lane.n_deferred:
        lane.n_deferred -= 1
        if not lane.deferred[lane.n_deferred].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP:
            fill_missing(capture, lane, lane.deferred_uffd[lane.n_deferred],
                         lane.deferred[lane.n_deferred].arg.pagefault.address & ~(PAGE - 1))


cdef bint await_arming(capture_t *capture, bint prearming) noexcept nogil:
    """Wait for T or, with `prearming`, for pre-arming to begin. False if the capture has ended before."""
    pthread_mutex_lock(&capture.lock)
    while not snap_load(&capture.armed) and not snap_load(&capture.stopping) \
            and not (prearming and snap_load(&capture.prearm.active)):
        pthread_cond_wait(&capture.changed, &capture.lock)
    pthread_mutex_unlock(&capture.lock)
    return not snap_load(&capture.stopping) or snap_load(&capture.armed)


cdef bint _begin_serving(capture_t *capture, lane_t *lane, uint64_t *seen) noexcept nogil:
    """Set this thread busy: the end of pre-arming waits for busy threads. While T is being fixed, this thread
    waits for T first. False if the capture has ended."""
    while True:
        seen[0] = snap_now_ns()
        snap_store_seq(&lane.busy_since, seen[0])
        if may_serve(capture):
            return True
        snap_store_seq(&lane.busy_since, 0)
        if not await_arming(capture, False):
            return False


cdef void _serve_until_stopped(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef epoll_event ready[8]
    cdef uint64_t seen, word
    cdef int i, n
    snap_name_thread("snap-fault")
    snap_nice_slice(FAULT_NICE, FAULT_SLICE_NS)
    # Fault threads are not bound to CPUs. With one thread bound to each CPU, a fault often waited for the
    # thread whose CPU a walker or an encoder was using (p99 300 µs; 60 µs without binding).
    if not snap_control(capture.serve_before_t) and not await_arming(capture, True):
        return
    while not snap_load(&capture.stopping):
        n = epoll_wait(capture.epoll, ready, 8, -1)
        if not _begin_serving(capture, lane, &seen):
            return
        for i in range(max(n, 0)):
            word = ready[i].data.u64
            if word == WATCH_PID:
                epoll_ctl(capture.epoll, EPOLL_CTL_DEL, capture.pidfd, NULL)
                capture_fail(capture, ESRCH, "the target ended", 0)
            elif word != WATCH_STOP:
                _serve_uffd(capture, lane, word, seen)
        serve_deferred(capture, lane)
        snap_store_seq(&lane.busy_since, 0)
        if lane.n_deferred:             # T was being fixed; no other thread serves these
            if not _begin_serving(capture, lane, &seen):
                return
            serve_deferred(capture, lane)
            snap_store_seq(&lane.busy_since, 0)


cdef void *fault_thread(void *arg) noexcept nogil:
    cdef lane_t *lane = <lane_t *>arg
    _serve_until_stopped(lane.capture, lane)
    snap_decrement(&lane.capture.running)   # the last access: the first walker waits for it
    return NULL
