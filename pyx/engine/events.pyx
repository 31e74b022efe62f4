"""Events of the userfaultfds (fork, remap, remove, unmap), and the list of userfaultfds.

Runs on capture threads. While an event waits to be read, the kernel answers each protect and unprotect with
EAGAIN, and the thread that caused the event waits. So a thread that gets EAGAIN reads the events
(`drain_events`) and defers the faults that it reads with them in its own list.

Fork: with EVENT_FORK (requested if memory is shared) a child's writes to shared memory fault, too, on a
userfaultfd of the child, which joins the list. Without it the child is not protected. That is right for
private memory: the child has its own copy.

Remap: with EVENT_REMAP (requested if an attached target has shared memory) moved pages stay protected until
they are recorded as lost. Remove: EVENT_REMOVE is requested only where nothing else shows what madvise()
discards: private mappings of memory files. Each such call of the target waits for its event to be read, and
so does each munmap() with EVENT_UNMAP. In other memory `pyx/engine/recheck` finds what they take away. (A
peer's descriptor may have these events, too.)
"""

from libc.errno cimport EAGAIN, EMFILE, ENFILE, ENOENT, ESRCH
from posix.unistd cimport close

from snapengine.base.atomics cimport (
    snap_add, snap_decrement, snap_load, snap_load_relaxed, snap_store, snap_swap,
)
from snapengine.kernel.linux cimport (
    UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE,
    UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP,
)
from snapengine.kernel.procmap_query cimport next_vma, vma_t
from snapengine.base.pthreads cimport pthread_mutex_lock, pthread_mutex_unlock, snap_sleep_ns
from snapengine.engine.state cimport DEFERRED_MAX, UFFDS_MAX, capture_fail, region_t
from snapengine.engine.recheck cimport invalidate
from snapengine.engine.watch cimport watch
from snapengine.kernel.uffd_read cimport (
    UFFD_MESSAGES, snap_remap_from, snap_remap_len, snap_remap_to, snap_removed, snap_removed_end, uffd_read,
)
from snapengine.kernel.uffd cimport protect_mapped, register_mapped, uffd_protect, uffd_unprotect, uffd_wake
from snapengine.engine.unregister cimport registered_until, unregister_all, unregister_range

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int dup3(int old, int new, int flags)

cdef uint64_t NEVER_MAPPED = 0x7fffffffe000     # the last page of a process on x86-64 is a guard (ENOENT)

cdef int _read(capture_t *capture, int uffd, uffd_msg *messages) noexcept nogil:
    """A REMOVE event releases its thread as it is read. Until its pages are invalidated here, no copy counts
    as valid (`recheck.event_readers`)."""
    cdef uint64_t start
    cdef int i, n
    snap_add(&capture.recheck.event_readers, 1)
    n = uffd_read(uffd, messages)
    for i in range(max(n, 0)):
        if messages[i].event == UFFD_EVENT_REMOVE and uffd == capture.uffds[0]:
            start = snap_removed(&messages[i])
            invalidate(capture, start, snap_removed_end(&messages[i]) - start, True)
    snap_decrement(&capture.recheck.event_readers)
    return n


cdef int read_messages(capture_t *capture, int uffd, uffd_msg *messages) noexcept nogil:
    cdef uint64_t spare
    cdef int n
    while True:
        n = _read(capture, uffd, messages)
        if n >= 0:
            return n
        if n == -EAGAIN:
            return 0
        if n != -EMFILE and n != -ENFILE:
            capture_fail(capture, -n, "read of the userfaultfd", 0)
            return 0
        # The event must be read, or the fork never returns: the reserved descriptor is closed to make room,
        # and the capture fails.
        spare = snap_swap(&capture.spare_fd, <uint64_t>-1)
        capture_fail(capture, EMFILE, "no descriptor is left for a fork of the target", 0)
        if spare == <uint64_t>-1:
            return 0
        close(<int>spare)


cdef bint _has_shared(capture_t *capture) noexcept nogil:
    cdef int i
    for i in range(capture.n_regions):
        if capture.regions[i].shared:
            return True
    return False


cdef int protect_left(capture_t *capture, int fd, uint64_t addr, uint64_t length) noexcept nogil:
    """What is left of the range in a forked child, whose mappings cannot be listed."""
    return protect_mapped(fd, -1, &capture.failed, addr, length)


cdef int _protect_region(capture_t *capture, int fd, region_t *region) noexcept nogil:
    """Registers what the parent had not registered yet when it forked (ENOENT)."""
    cdef uint64_t length = region.track_end - region.track_start
    cdef uint64_t mode = UFFDIO_REGISTER_MODE_WP | (UFFDIO_REGISTER_MODE_MISSING if region.missing else 0)
    cdef int err = uffd_protect(fd, region.track_start, length)
    if err != ENOENT:
        return err
    err = register_mapped(fd, -1, &capture.failed, region.track_start, length, region.unit_pages * 4096, mode)
    return err if err else protect_left(capture, fd, region.track_start, length)


cdef void _read_of(capture_t *capture, int fd) noexcept nogil:
    """Events of a child that is not in the list yet. It runs from the moment its fork event was read."""
    cdef uffd_msg messages[UFFD_MESSAGES]
    cdef int i, n
    n = read_messages(capture, fd, messages)
    for i in range(n):
        if messages[i].event == UFFD_EVENT_FORK:
            _adopt_child(capture, <int>messages[i].arg.fork.ufd)
        elif messages[i].event == UFFD_EVENT_REMAP:
            unregister_range(capture, fd, snap_remap_to(&messages[i]),
                             snap_remap_to(&messages[i]) + snap_remap_len(&messages[i]))
        elif messages[i].event == UFFD_EVENT_PAGEFAULT:     # it faults again once the child is in the list
            uffd_wake(fd, messages[i].arg.pagefault.address & ~<uint64_t>4095, 4096)


cdef int _protect_child(capture_t *capture, int fd) noexcept nogil:
    cdef int err = 0
    cdef int i = 0
    while i < capture.n_regions and not err:
        if capture.regions[i].shared:
            err = _protect_region(capture, fd, &capture.regions[i])
            if err == EAGAIN and not snap_load(&capture.failed):
                _read_of(capture, fd)   # it forks already
                err = 0
                continue
        i += 1
    return err


cdef int _place_for(capture_t *capture, int *fd) noexcept nogil:
    """The index of a child's userfaultfd, -1 if there are too many. With capture.lock held.

    The place of a child that has ended is reused, and its descriptor number with it: a thread that still
    reads from that number gets the messages of the new child, with the right index.
    """
    cdef int i
    cdef uint64_t n = snap_load_relaxed(&capture.n_uffds)
    if n < UFFDS_MAX:
        capture.uffds[n] = fd[0]
        snap_store(&capture.n_uffds, n + 1)
        return <int>n
    for i in range(1, UFFDS_MAX):
        if uffd_unprotect(capture.uffds[i], NEVER_MAPPED, 4096) == ESRCH:
            dup3(fd[0], capture.uffds[i], O_CLOEXEC)
            close(fd[0])
            fd[0] = capture.uffds[i]
            return i
    return -1


cdef void _adopt_child(capture_t *capture, int fd) noexcept nogil:
    """Until T the child must be protected like its parent: the fork may have copied page tables between two
    protect calls. After T it inherits exactly what is still protected."""
    cdef int err = 0
    cdef int place
    if not _has_shared(capture):
        close(fd)
        return
    if not snap_load(&capture.armed):
        err = _protect_child(capture, fd)
        if err and err != ESRCH:    # ESRCH: the child has ended already
            capture_fail(capture, err, "protecting a forked child", 0)
    pthread_mutex_lock(&capture.lock)
    place = _place_for(capture, &fd)
    pthread_mutex_unlock(&capture.lock)
    if place < 0:
        unregister_all(capture, fd, True)
        close(fd)
        capture_fail(capture, EMFILE, "the target forked too often while its shared memory was saved", 0)
        return
    err = watch(capture, fd, <uint64_t>place)
    if err:
        capture_fail(capture, err, "epoll_ctl", 0)


cdef void _handle_move(capture_t *capture, uint64_t uffd, const uffd_msg *message) noexcept nogil:
    """Moved pages keep their protection, but cannot be saved by their new address: unregister them. Those not
    saved yet are lost, and must be recorded so before a writer runs at the new place."""
    cdef uint64_t start = snap_remap_to(message)
    cdef uint64_t length = snap_remap_len(message)
    cdef uint64_t end = start + length
    cdef vma_t place
    if uffd == 0:
        invalidate(capture, snap_remap_from(message), length, False)
        invalidate(capture, start, length, False)
        # It may have grown by the move. Unregister all of it: in two mappings it could not be moved as one.
        if capture.attached and not next_vma(capture.maps, start, &place) and place.start <= start:
            end = registered_until(capture, start + length, max(end, place.end))
    unregister_range(capture, capture.uffds[uffd], start, end)


cdef void handle_event(capture_t *capture, uint64_t uffd, const uffd_msg *message) noexcept nogil:
    if message.event == UFFD_EVENT_FORK:
        _adopt_child(capture, <int>message.arg.fork.ufd)
    elif message.event == UFFD_EVENT_REMAP:
        _handle_move(capture, uffd, message)
    # UNMAP: reading the message releases the caller; recheck finds the pages lost. REMOVE: see _read.


cdef void defer_fault(capture_t *capture, lane_t *lane, uint64_t uffd,
                      const uffd_msg *message) noexcept nogil:
    if lane.n_deferred < DEFERRED_MAX:
        lane.deferred[lane.n_deferred] = message[0]
        lane.deferred_uffd[lane.n_deferred] = <unsigned int>uffd
        lane.n_deferred += 1
    else:                           # no room: it faults again
        uffd_wake(capture.uffds[uffd], message.arg.pagefault.address & ~<uint64_t>4095, 4096)


cdef void drain_events(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef uffd_msg messages[UFFD_MESSAGES]
    cdef uint64_t index = 0
    cdef int i, n
    while index < snap_load(&capture.n_uffds):
        n = read_messages(capture, capture.uffds[index], messages) if capture.uffds[index] >= 0 else 0
        for i in range(n):
            if messages[i].event != UFFD_EVENT_PAGEFAULT:
                handle_event(capture, index, &messages[i])
            else:
                defer_fault(capture, lane, index, &messages[i])
        index += 1


cdef void _finish_forks(capture_t *capture, lane_t *lane, int fd) noexcept nogil:
    """Read the events that are still to come. A fork in progress answers EAGAIN here until its event is read.
    Closing the descriptor would not end its wait: the new child holds a copy of it already."""
    cdef region_t *region = &capture.regions[0]
    while uffd_unprotect(fd, region.track_start, region.unit_pages * 4096) == EAGAIN:
        drain_events(capture, lane)
        if snap_load(&capture.failed) and capture.spare_fd == <uint64_t>-1:
            return
        snap_sleep_ns(20000)


cdef void close_all(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef uint64_t index = 0
    cdef int fd
    while index < snap_load(&capture.n_uffds):
        fd = capture.uffds[index]
        if fd >= 0 and capture.n_registered:
            unregister_all(capture, fd, index > 0)
            _finish_forks(capture, lane, fd)
        # Before the close: a child forked in between must not close a reused descriptor.
        capture.uffds[index] = -1
        if fd >= 0:
            close(fd)
        index += 1
    lane.n_deferred = 0                 # unregistering woke them
    snap_store(&capture.n_uffds, 1)
