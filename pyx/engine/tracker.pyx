"""Write tracking: arm, serve faults, walk, release. The threads of a capture and their life cycle.

The first walker's thread (no Python state, no GIL, no allocation):

    wait for the caller → register → protect … protect → T → scan the page tables → `armed`: faults are served
    (two-step: register → protect … → wait for the caller → protect the dirty pages → T → …)
             → walk: next unit of unclaimed pages: claim, copy, unprotect
             → wait for the other walkers → stop the fault threads
             → unregister (releases all remaining memory) → finished

The other walkers help to protect, wait for `armed`, and walk.

Shared words: capture.armed, stopping and finished are written by the first walker (release) and read by all
threads (acquire). If a thread cannot be created, there is no first walker, and the caller writes stopping.
capture.go and hold are written by the caller, together; hold is later reset to 0.
capture.failed is set once, by the first thread that fails. If a walker stops anywhere before `finished`,
writers of unsaved pages wait. Therefore every failure path runs through close_all, and when the process ends,
the kernel closes the userfaultfd, which releases the memory as well.
"""

from libc.errno cimport EBUSY, errno
from libc.stdint cimport uint64_t
from posix.unistd cimport close, getpid, write

from snapengine.engine.arming cimport arm
from snapengine.base.atomics cimport snap_decrement, snap_load, snap_store
from snapengine.engine.events cimport close_all
from snapengine.engine.watch cimport WATCH_PID, WATCH_STOP, watch
from snapengine.engine.fault_threads cimport answer_missing, fault_thread, serve_deferred
from snapengine.engine.parallel cimport help_parallel
from snapengine.pipeline.pool cimport lane_close, lane_open, pool_finish
from snapengine.base.pthreads cimport (
    LONG_SLICE_NS, pthread_cond_broadcast, pthread_cond_wait, pthread_join, pthread_mutex_lock,
    pthread_mutex_unlock, snap_name_thread, snap_nice_slice, snap_now_ns, snap_sleep_ns, snap_thread_start,
)
from snapengine.engine.session cimport Session
from snapengine.engine.state cimport capture_fail, capture_t, lane_t
from snapengine.engine.walk cimport claim_shared_pages, save_shared_pages, walk
from snapengine.engine.watchdog cimport watchdog_thread

cdef extern from "<sys/epoll.h>" nogil:
    int epoll_create1(int flags)
    const int EPOLL_CLOEXEC

# With few CPUs the walk should not share them evenly with writers: the sooner it is done, the fewer faults
# they have. Its priority is below that of the fault threads. Its slice is so long that a released writer
# preempts it at once (p99 of a stall 120 instead of 190 µs, with 16 pages a fault).
cdef int WALK_NICE = -5


cdef void _publish(capture_t *capture, uint64_t *word) noexcept nogil:
    pthread_mutex_lock(&capture.lock)
    snap_store(word, 1)
    pthread_cond_broadcast(&capture.changed)
    pthread_cond_broadcast(&capture.parallel.wanted)
    pthread_mutex_unlock(&capture.lock)


cdef void _await_walk(capture_t *capture) noexcept nogil:
    """The walk would take the CPUs that the caller needs to let the stopped target run again, so it waits
    until that is done. Faults are served meanwhile."""
    pthread_mutex_lock(&capture.lock)
    while snap_load(&capture.hold) and not snap_load(&capture.failed):
        pthread_cond_wait(&capture.changed, &capture.lock)
    pthread_mutex_unlock(&capture.lock)


cdef void _stop_others(capture_t *capture, lane_t *lane) noexcept nogil:
    """Wait by counters until the last thread has left: pthread_join frees memory, and free() would write to
    pages that may still be protected. A walker may need a fault thread, so fault threads stay until the
    walkers have left. One of them may itself wait for a missing page: it is filled here."""
    cdef uint64_t one = 1
    while snap_load(&capture.armed) and snap_load(&capture.walking):
        snap_sleep_ns(20000)
    _publish(capture, &capture.stopping)
    write(capture.stop_event, &one, 8)
    while snap_load(&capture.running) or snap_load(&capture.walking):
        answer_missing(capture, lane)
        if snap_load(&capture.running) or snap_load(&capture.walking):
            snap_sleep_ns(20000)


cdef void *_first_walker(void *arg) noexcept nogil:
    cdef lane_t *lane = <lane_t *>arg
    cdef capture_t *capture = lane.capture
    cdef int i
    snap_name_thread("snap-walk")
    if not arm(capture, lane):
        claim_shared_pages(capture)
        capture.rounds = 1
        _publish(capture, &capture.armed)
        if not save_shared_pages(capture, lane):
            serve_deferred(capture, lane)
            _await_walk(capture)
            snap_nice_slice(WALK_NICE, LONG_SLICE_NS)
            walk(capture, lane)
    _stop_others(capture, lane)
    # No other thread runs any more, so no page is released while it is copied.
    close_all(capture, lane)
    for i in range(capture.n_lanes):
        if lane_close(capture.pool, &capture.lanes[i].slot):
            capture_fail(capture, EBUSY, "queue", 0)
    pool_finish(capture.pool)
    _publish(capture, &capture.finished)
    return NULL


cdef void *_other_walker(void *arg) noexcept nogil:
    cdef lane_t *lane = <lane_t *>arg
    cdef capture_t *capture = lane.capture
    snap_name_thread("snap-walk")
    help_parallel(capture, lane)
    if snap_load(&capture.armed):
        serve_deferred(capture, lane)
        _await_walk(capture)
        snap_nice_slice(WALK_NICE, LONG_SLICE_NS)
        walk(capture, lane)
    snap_decrement(&capture.walking)
    return NULL


cdef class Tracker:
    """Write tracking of one `Session`.

    `start` creates the threads, and `arm` fixes T; `join` waits until all memory is released. Between `arm`
    and `join` the target's writers run. `Session.fail` ends the capture early; the target is released in any
    case."""

    def __init__(self, Session session not None):
        self.session = session
        self.running = False
        self.owner = getpid()

    def start(self):
        """Create the threads; with two-step arming, protect. Returns when `arm` may be called, or when the
        capture has failed.

        Does not raise if the target cannot be armed: see `Session.failure`. Raises OSError if a thread cannot
        be created."""
        cdef capture_t *capture = self.session.capture
        cdef int i, err
        if self.running or snap_load(&capture.finished):
            raise RuntimeError("a tracker runs once")
        capture.epoll = epoll_create1(EPOLL_CLOEXEC)
        if capture.epoll < 0:
            raise OSError(errno, "epoll_create1")
        err = watch(capture, capture.stop_event, WATCH_STOP) or watch(capture, capture.uffds[0], 0)
        if not err and capture.pidfd >= 0:
            err = watch(capture, capture.pidfd, WATCH_PID)
        for i in range(capture.n_lanes):
            if i != capture.n_fault_lanes + 1:      # the watchdog saves nothing
                err = err or lane_open(capture.pool, &capture.lanes[i].slot)
        if err:
            self._drop_epoll()
            raise OSError(err, "the capture's descriptors cannot be watched")
        self._make_threads(capture)
        with nogil:
            pthread_mutex_lock(&capture.lock)
            while not snap_load(&capture.ready) and not snap_load(&capture.finished):
                pthread_cond_wait(&capture.changed, &capture.lock)
            pthread_mutex_unlock(&capture.lock)

    def arm(self, bint hold=False):
        """Fix T. Returns when T is fixed or the capture has failed. With `hold` the walk waits for `walk`.
        Call it once, after `start`."""
        cdef capture_t *capture = self.session.capture
        with nogil:
            pthread_mutex_lock(&capture.lock)
            snap_store(&capture.hold, hold)
            snap_store(&capture.go, 1)
            pthread_cond_broadcast(&capture.changed)
            while not snap_load(&capture.armed) and not snap_load(&capture.finished):
                pthread_cond_wait(&capture.changed, &capture.lock)
            pthread_mutex_unlock(&capture.lock)

    cdef int _make_threads(self, capture_t *capture) except -1:
        """The first walker is created last: until it runs, nothing is protected, and the other threads can be
        ended."""
        cdef int made = 0
        cdef int err = 0
        cdef int i
        cdef lane_t *lane
        capture.running = capture.n_fault_lanes + 1
        capture.walking = self.session.walkers - 1
        for i in range(1, capture.n_lanes):
            lane = &capture.lanes[i]
            if i <= capture.n_fault_lanes:
                err = snap_thread_start(&lane.thread, fault_thread, lane)
            elif lane.walks:
                err = snap_thread_start(&lane.thread, _other_walker, lane)
            else:
                err = snap_thread_start(&lane.thread, watchdog_thread, lane)
            if err:
                break
            made = i
        if not err:
            err = snap_thread_start(&capture.lanes[0].thread, _first_walker, &capture.lanes[0])
        if err:
            _publish(capture, &capture.stopping)
            for i in range(1, made + 1):
                pthread_join(capture.lanes[i].thread, NULL)
            self._drop_epoll()
            pool_finish(capture.pool)
            raise OSError(err, "pthread_create")
        self.running = True
        return 0

    def wait(self, double seconds):
        """Wait until all memory is released, or the time has passed. True if it is released."""
        cdef capture_t *capture = self.session.capture
        cdef uint64_t until = snap_now_ns() + <uint64_t>(seconds * 1e9)
        with nogil:
            while not snap_load(&capture.finished) and snap_now_ns() < until:
                snap_sleep_ns(1000000)
        return snap_load(&capture.finished) != 0

    def walk(self):
        """Let the walk begin, after `arm` with `hold`: the target runs again. Idempotent."""
        cdef capture_t *capture = self.session.capture
        with nogil:
            pthread_mutex_lock(&capture.lock)
            snap_store(&capture.hold, 0)
            pthread_cond_broadcast(&capture.changed)
            pthread_mutex_unlock(&capture.lock)

    def join(self):
        """Wait until the target is released and the threads have ended. Idempotent."""
        if self.running:
            self.walk()
            with nogil:
                self._join_all()
            self.running = False
            self._drop_epoll()

    cdef void _join_all(self) noexcept nogil:
        cdef int i
        for i in range(self.session.capture.n_lanes):
            pthread_join(self.session.capture.lanes[i].thread, NULL)

    cdef int _drop_epoll(self) except -1:
        if self.session.capture.epoll >= 0:
            close(self.session.capture.epoll)
            self.session.capture.epoll = -1
        return 0

    def __dealloc__(self):
        # self.running is still set only if an exception skipped join(). The threads must not outlive their
        # memory. In a forked child the threads are the parent's, and the arenas are wiped.
        if self.running and getpid() == self.owner:
            with nogil:
                capture_fail(self.session.capture, EBUSY, "abandoned", 0)
                self._join_all()
