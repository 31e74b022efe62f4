"""Parallel arming: all walkers take pieces of protecting, protecting again, and scanning the page tables.

The kernel takes its locks for reading there, so two threads are nearly twice as fast (protecting 1 GiB of 4
KiB pages: 22 ms by one, 14 ms by two). The work is done when its last piece is, whichever walker did it.

`work`, `pieces`, `taken` and `busy` of `capture.parallel` are changed under `capture.lock`. If a walker stops
between taking a piece and finishing it, T never comes: no fault is served, writers wait, and the kernel
releases the target when the process ends.
"""

from snapengine.base.atomics cimport snap_load, snap_load_seq, snap_pause, snap_load_relaxed
from snapengine.base.pthreads cimport (
    cpu_set_t, pthread_cond_broadcast, pthread_cond_signal, pthread_cond_t, pthread_cond_wait,
    pthread_mutex_lock, pthread_mutex_unlock, snap_leave_cpu, snap_nice_slice, snap_now_ns,
    snap_restore_affinity,
)

cdef extern from "<sched.h>" nogil:
    int sched_yield()
    int sched_getcpu()

cdef uint64_t SPIN_NS = 20000000   # no walker spins for longer; T normally comes sooner
# In the pause walkers get a higher priority than writers, which soon wait for T anyway. Before the pause they
# do not: a writer that gets no CPU does not touch the pages that are protected already. With a short slice
# the other walkers get a CPU at once.
cdef int PAUSE_NICE = -15
cdef uint64_t PAUSE_SLICE_NS = 100000
cdef int SPINS = 20                 # about 1 µs


cdef bint _take(capture_t *capture, piece_work_t *work, uint64_t *piece) noexcept nogil:
    """Called with the lock held."""
    if capture.parallel.taken == capture.parallel.pieces or snap_load(&capture.failed):
        return False
    work[0] = <piece_work_t>capture.parallel.work
    piece[0] = capture.parallel.taken
    capture.parallel.taken += 1
    capture.parallel.busy += 1
    return True


cdef bint _work_one(capture_t *capture, lane_t *lane) noexcept nogil:
    """Called with the lock held; releases it while it works. False if no piece was left."""
    cdef piece_work_t work = NULL
    cdef uint64_t piece = 0
    if not _take(capture, &work, &piece):
        return False
    pthread_mutex_unlock(&capture.lock)
    work(capture, lane, piece)
    pthread_mutex_lock(&capture.lock)
    capture.parallel.busy -= 1
    if capture.parallel.busy == 0 and lane.index:
        pthread_cond_signal(&capture.parallel.done)
    return True


cdef void run_parallel(capture_t *capture, lane_t *lane, piece_work_t work, uint64_t pieces) noexcept nogil:
    if pieces == 1:                 # waking another walker would take longer
        work(capture, lane, 0)
        return
    pthread_mutex_lock(&capture.lock)
    capture.parallel.work = <void *>work
    capture.parallel.pieces = pieces
    capture.parallel.taken = 0
    pthread_cond_broadcast(&capture.parallel.wanted)
    while _work_one(capture, lane):
        pass
    while capture.parallel.busy:
        _wait(capture, &capture.parallel.done)
    pthread_mutex_unlock(&capture.lock)


cdef void begin_spinning(capture_t *capture) noexcept nogil:
    snap_nice_slice(PAUSE_NICE, PAUSE_SLICE_NS)
    pthread_mutex_lock(&capture.lock)
    capture.parallel.spin_cpu = sched_getcpu()
    capture.parallel.spin_until_ns = snap_now_ns() + SPIN_NS
    pthread_cond_broadcast(&capture.parallel.wanted)
    pthread_mutex_unlock(&capture.lock)


cdef void _wait(capture_t *capture, pthread_cond_t *changed) noexcept nogil:
    """Called with the lock held; releases it while it waits. A wake-up by pthread_cond_wait() takes 30 to 50
    µs, as long as the work of the pause itself, so walkers spin there."""
    cdef int _i
    if not capture.parallel.spin_until_ns or snap_now_ns() > capture.parallel.spin_until_ns:
        pthread_cond_wait(changed, &capture.lock)
        return
    pthread_mutex_unlock(&capture.lock)
    sched_yield()
    for _i in range(SPINS):
        snap_pause()
    pthread_mutex_lock(&capture.lock)


cdef bint _may_help(capture_t *capture) noexcept nogil:
    """Before the pause no walker spins. Once writers have met protected pages, and CPUs are scarce, the
    writers and the fault threads need the CPU that this walker would take (two CPUs, one writer: p50 and p99
    of a stall in arming are 57 and 123 µs with this walker, 18 and 65 µs without it)."""
    cdef int i
    if not capture.parallel.cpus_scarce or not snap_load_seq(&capture.prearm.active):
        return True
    for i in range(1, capture.n_fault_lanes + 1):
        if snap_load_relaxed(&capture.lanes[i].arming_faults):
            return False
    return True


cdef void help_parallel(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef cpu_set_t before
    cdef bint spins_now = False
    cdef bint moved = False
    snap_nice_slice(0, PAUSE_SLICE_NS)
    pthread_mutex_lock(&capture.lock)
    while not snap_load(&capture.armed) and not snap_load(&capture.stopping):
        if capture.parallel.spin_until_ns and not spins_now:
            spins_now = True
            snap_nice_slice(PAUSE_NICE, PAUSE_SLICE_NS)
            # On the first walker's CPU this walker would only wait. Half of the time the scheduler had put it
            # there, and the pause took 2.3 instead of 1.3 ms.
            moved = snap_leave_cpu(capture.parallel.spin_cpu, &before)
        if not _may_help(capture) or not _work_one(capture, lane):
            _wait(capture, &capture.parallel.wanted)
    pthread_mutex_unlock(&capture.lock)
    if moved:
        snap_restore_affinity(&before)


cdef uint64_t spans(capture_t *capture) noexcept nogil:
    return (capture.page_end + capture.parallel.span_pages - 1) // capture.parallel.span_pages


cdef int first_region(capture_t *capture, uint64_t page) noexcept nogil:
    """Regions are in ascending order of page numbers."""
    cdef int low = 0
    cdef int high = capture.n_regions
    cdef int middle
    while low < high:
        middle = (low + high) // 2
        if capture.regions[middle].first_page + capture.regions[middle].pages <= page:
            low = middle + 1
        else:
            high = middle
    return low


cdef bint span_of(capture_t *capture, region_t *region, uint64_t span, uint64_t *first,
                  uint64_t *end) noexcept nogil:
    first[0] = max(region.first_page, span * capture.parallel.span_pages)
    end[0] = min(region.first_page + region.pages, (span + 1) * capture.parallel.span_pages)
    return first[0] < end[0]
