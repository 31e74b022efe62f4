"""Write tracking: arm, serve faults, walk, release.

Life of a capture, on the walk thread (no Python state, no GIL, no allocation):

  register → protect … protect → T → scan the page tables → let the fault threads go
           → walk: next run of unclaimed pages: claim, copy, unprotect
           → stop the fault threads → unregister (releases all that is left) → finished

Shared words: capture.armed, stopping and finished are written by the walk thread only (release) and
read by all (acquire). capture.failed is set once by whoever fails first. If the walk stops anywhere
before `finished`, writers of unsaved pages wait; every failure path therefore runs through forget_all,
and the death of the process closes the userfaultfd, which does the same in the kernel.
"""

from libc.errno cimport EAGAIN, EBUSY, ENXIO, errno
from libc.stdint cimport uint64_t
from posix.unistd cimport close, getpid, lseek, write

from snapengine.atomics cimport snap_load, snap_store
from snapengine.bitmap cimport bits_claim, bits_mask
from snapengine.events cimport WATCH_PID, WATCH_STOP, forget_all, pump, watch
from snapengine.faults cimport answer_missing, fault_thread, serve_held, warden_thread
from snapengine.image_format cimport SNAP_HOLE
from snapengine.linux cimport UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
from snapengine.pool cimport lane_close, lane_open, lane_room, pool_end
from snapengine.pthreads cimport (
    pthread_cond_broadcast, pthread_cond_wait, pthread_join, pthread_mutex_lock, pthread_mutex_unlock,
    snap_name_thread, snap_now_ns, snap_sleep_ns, snap_thread_start,
)
from snapengine.saver cimport claim_unit, release, save_unit, save_window, unit_of
from snapengine.session cimport Session, capture_fail, capture_t, lane_t, page_addr, region_t
from snapengine.source cimport copy_run, populated, put_pages, scan_presence
from snapengine.uffd cimport uffd_protect, uffd_register, uffd_unregister

cdef extern from "<sys/epoll.h>" nogil:
    int epoll_create1(int flags)
    const int EPOLL_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    const int SEEK_DATA

cdef uint64_t PAGE = 4096
cdef uint64_t UNIT = 2 << 20


cdef void _publish(capture_t *capture, uint64_t *word) noexcept nogil:
    pthread_mutex_lock(&capture.lock)
    snap_store(word, 1)
    pthread_cond_broadcast(&capture.changed)
    pthread_mutex_unlock(&capture.lock)


cdef int _protect(capture_t *capture, lane_t *lane, uint64_t addr, uint64_t length) noexcept nogil:
    cdef uint64_t piece = capture.arm_piece if capture.arm_piece else length
    cdef uint64_t end = addr + length
    cdef int err
    while addr < end:
        err = uffd_protect(capture.uffds[0], addr, min(piece, end - addr))
        if err == EAGAIN:
            # A fork is under way in the target: its event must be read before anything is protected.
            # Faults that come along are kept: none is served before T.
            if snap_load(&capture.failed):
                return err
            pump(capture, lane)
            continue
        if err:
            capture_fail(capture, err, "UFFDIO_WRITEPROTECT", addr)
            return err
        addr += piece
    return 0


cdef int _protect_sparse(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
    """Protect the 2 MiB units of a file that hold data. Protecting a hole of shared memory fills its
    page tables with markers: 128 MiB of them and half a second for 64 GiB. The holes are registered for
    missing faults, which wait until T like all others, so no hole can fill meanwhile."""
    cdef uint64_t size = region.pages * PAGE
    cdef uint64_t offset = 0
    cdef uint64_t begin, end
    cdef long data
    cdef int err
    while offset < size:
        data = lseek(region.file, region.file_offset + offset, SEEK_DATA)
        if data < 0 and errno == ENXIO:
            return 0
        begin = 0 if data < 0 else <uint64_t>data - region.file_offset
        if begin >= size:
            return 0
        begin = (region.addr + begin) & ~(UNIT - 1)
        end = size + region.addr if data < 0 else begin + UNIT
        begin = max(begin, region.addr)
        end = min(end, region.addr + size)
        err = _protect(capture, lane, begin, end - begin)
        if err:
            return err
        offset = end - region.addr
    return 0


cdef int _register(capture_t *capture, region_t *region) noexcept nogil:
    cdef uint64_t mode = UFFDIO_REGISTER_MODE_WP
    cdef int err
    if region.missing:
        mode |= UFFDIO_REGISTER_MODE_MISSING
    elif capture.pid:
        # A peer may have registered for missing faults itself. With WP_UNPOPULATED its holes get markers,
        # which no UFFDIO_ZEROPAGE fills (EEXIST): a fault on one could never be answered.
        uffd_unregister(capture.uffds[0], region.track_start, region.track_end - region.track_start)
    err = uffd_register(capture.uffds[0], region.track_start, region.track_end - region.track_start, mode)
    if err:
        capture_fail(capture, err, "UFFDIO_REGISTER", region.track_start)
    return err


cdef bint _shared_with_another(capture_t *capture, region_t *region, uint64_t addr) noexcept nogil:
    cdef int i
    cdef region_t *other
    for i in range(capture.n_regions):
        other = &capture.regions[i]
        if other != region and other.addr <= addr < other.addr + other.pages * PAGE:
            return True
    return False


cdef uint64_t _edge(capture_t *capture, int i, int which, uint64_t *addr) noexcept nogil:
    """Page number and address of the first or last page of region i."""
    cdef region_t *region = &capture.regions[i]
    cdef uint64_t page = region.first_page + (region.pages - 1 if which else 0)
    addr[0] = page_addr(region, page)
    return page


cdef void _claim_shared_pages(capture_t *capture) noexcept nogil:
    """Pages in which one region ends and another begins: unprotecting such a page for the one would let
    the other's bytes change. They are claimed before any fault is served; who faults on one waits."""
    cdef int i, which
    cdef uint64_t page, addr
    for i in range(capture.n_regions):
        for which in range(2):
            page = _edge(capture, i, which, &addr)
            if _shared_with_another(capture, &capture.regions[i], addr):
                bits_claim(capture.claimed, page >> 6, <uint64_t>1 << (page & 63))


cdef int _save_shared_pages(capture_t *capture, lane_t *lane) noexcept nogil:
    """Copy them for every region first; only then call them saved, and release them."""
    cdef int i, which, err
    cdef uint64_t page, addr, bit
    cdef region_t *region
    for i in range(capture.n_regions):
        region = &capture.regions[i]
        for which in range(2):
            page = _edge(capture, i, which, &addr)
            if not _shared_with_another(capture, region, addr) or (which and region.pages == 1):
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
            page = _edge(capture, i, which, &addr)
            if _shared_with_another(capture, &capture.regions[i], addr):
                bits_claim(capture.saved, page >> 6, <uint64_t>1 << (page & 63))
    for i in range(capture.n_regions):
        for which in range(2):
            _edge(capture, i, which, &addr)
            if _shared_with_another(capture, &capture.regions[i], addr):
                release(capture, lane, 0, addr, PAGE)
    return 0


cdef int _arm(capture_t *capture, lane_t *lane) noexcept nogil:
    """Returns 0 once T is fixed, or non-zero: the capture has failed."""
    cdef int i, err
    cdef region_t *region
    cdef uint64_t begin = snap_now_ns()
    for i in range(capture.n_regions):
        if _register(capture, &capture.regions[i]):
            return 1
        capture.n_registered = i + 1    # what is not ours by now is never unregistered by us
    for i in range(capture.n_regions):
        region = &capture.regions[i]
        if region.sparse:
            err = _protect_sparse(capture, lane, region)
        else:
            err = _protect(capture, lane, region.track_start, region.track_end - region.track_start)
        if err:
            return 1
    capture.t_ns = snap_now_ns()
    err = scan_presence(capture, lane)
    if err:
        capture_fail(capture, err, "scan of the page tables", 0)
        return 1
    _claim_shared_pages(capture)
    capture.arm_ns = snap_now_ns() - begin
    capture.rounds = 1
    _publish(capture, &capture.armed)
    if _save_shared_pages(capture, lane):
        return 1
    serve_held(capture, lane)
    return 0


cdef int _walk_region(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
    cdef uint64_t page = region.first_page
    cdef uint64_t end = region.first_page + region.pages
    cdef uint64_t first, n, won, mask, data
    cdef int err
    while page < end:
        err = lane_room(capture.pool, &lane.slot, 64, True)
        if err:
            capture_fail(capture, err, "queue", 0)
        if snap_load(&capture.failed):
            return 1
        unit_of(capture, region, page, &first, &n)
        if n > 1:
            if claim_unit(capture, first, n) and save_unit(capture, lane, region, first, n):
                return 1
            page = first + n
        else:
            n = min(64 - (page & 63), end - page)
            mask = bits_mask(page & 63, n)
            data = populated(capture, lane, region, page & ~<uint64_t>63, mask)
            won = bits_claim(capture.claimed, page >> 6, mask)
            if won and save_window(capture, lane, region, page & ~<uint64_t>63, won, data & won):
                return 1
            page += n
    return 0


cdef void _stop_fault_threads(capture_t *capture, lane_t *lane) noexcept nogil:
    """Wait until the last has left, by a count: pthread_join frees memory, and free() would write to pages
    that may be protected still. One of them may wait for a missing page itself: it is answered here."""
    cdef uint64_t one = 1
    _publish(capture, &capture.stopping)
    write(capture.stop_event, &one, 8)
    while snap_load(&capture.running):
        answer_missing(capture, lane)
        if snap_load(&capture.running):
            snap_sleep_ns(20000)


cdef void *_walk_thread(void *arg) noexcept nogil:
    cdef lane_t *lane = <lane_t *>arg
    cdef capture_t *capture = lane.capture
    cdef int i
    snap_name_thread("snap-walk")
    if not _arm(capture, lane):
        for i in range(capture.n_regions):
            if _walk_region(capture, lane, &capture.regions[i]):
                break
    _stop_fault_threads(capture, lane)
    # No fault thread runs any more, so no page is released that is still being copied.
    forget_all(capture, lane)
    for i in range(capture.n_fault_lanes + 1):
        if lane_close(capture.pool, &capture.lanes[i].slot):
            capture_fail(capture, EBUSY, "queue", 0)
    pool_end(capture.pool)
    _publish(capture, &capture.finished)
    return NULL


cdef class Tracker:
    """Write tracking of one `Session`.

    `start` makes the threads and returns once T is fixed; `join` waits until all is released. Between
    them the target's writers run. `Session.fail` ends it early; the target is released in any case.
    """

    def __init__(self, Session session not None):
        self.session = session
        self.running = False
        self.owner = getpid()

    def start(self):
        """Make the threads, arm, and return at T. Raises nothing for a target that cannot be armed: ask
        `Session.failure`. Raises OSError if no thread can be made."""
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
        for i in range(capture.n_fault_lanes + 1):
            err = err or lane_open(capture.pool, &capture.lanes[i].slot)
        if err:
            self._drop_epoll()
            raise OSError(err, "the capture's descriptors cannot be watched")
        self._make_threads(capture)
        with nogil:
            pthread_mutex_lock(&capture.lock)
            while not snap_load(&capture.armed) and not snap_load(&capture.finished):
                pthread_cond_wait(&capture.changed, &capture.lock)
            pthread_mutex_unlock(&capture.lock)

    cdef int _make_threads(self, capture_t *capture) except -1:
        """The walk comes last: until it runs, nothing is protected and all can be undone."""
        cdef int made = 0
        cdef int err = 0
        cdef int i
        cdef lane_t *lane
        capture.running = capture.n_fault_lanes + 1
        for i in range(1, capture.n_fault_lanes + 2):
            lane = &capture.lanes[i]
            if i <= capture.n_fault_lanes:
                err = snap_thread_start(&lane.thread, fault_thread, lane)
            else:
                err = snap_thread_start(&lane.thread, warden_thread, lane)
            if err:
                break
            made = i
        if not err:
            err = snap_thread_start(&capture.lanes[0].thread, _walk_thread, &capture.lanes[0])
        if err:
            _publish(capture, &capture.stopping)
            for i in range(1, made + 1):
                pthread_join(capture.lanes[i].thread, NULL)
            self._drop_epoll()
            pool_end(capture.pool)
            raise OSError(err, "pthread_create")
        self.running = True
        return 0

    def wait(self, double seconds):
        """Wait until everything is released, or so long. Whether it is."""
        cdef capture_t *capture = self.session.capture
        cdef uint64_t until = snap_now_ns() + <uint64_t>(seconds * 1e9)
        with nogil:
            while not snap_load(&capture.finished) and snap_now_ns() < until:
                snap_sleep_ns(1000000)
        return snap_load(&capture.finished) != 0

    def join(self):
        """Wait until the target is released and the threads are gone. Idempotent."""
        if self.running:
            with nogil:
                self._join_all()
            self.running = False
            self._drop_epoll()

    cdef void _join_all(self) noexcept nogil:
        cdef int i
        for i in range(self.session.capture.n_fault_lanes + 2):
            pthread_join(self.session.capture.lanes[i].thread, NULL)

    cdef int _drop_epoll(self) except -1:
        if self.session.capture.epoll >= 0:
            close(self.session.capture.epoll)
            self.session.capture.epoll = -1
        return 0

    def __dealloc__(self):
        # Reached only if an exception skipped join(): the threads must not outlive their memory.
        # In a forked child the threads are the parent's, and the arenas are wiped.
        if self.running and getpid() == self.owner:
            with nogil:
                capture_fail(self.session.capture, EBUSY, "abandoned", 0)
                self._join_all()
