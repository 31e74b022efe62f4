"""Messages of the userfaultfds that are not page faults, and the list of userfaultfds itself.

Runs on capture threads. While an event waits to be read, the kernel answers every protect and
unprotect with EAGAIN, and the thread that caused the event stands still: so whoever gets EAGAIN reads
(`pump`), and keeps the faults that come along in its own list.

Fork: with EVENT_FORK (asked for when memory is shared) a child's writes to shared memory fault too, on
a userfaultfd of the child's; it joins the list. Without it the child is not protected, which is
right for private memory: the child has its own copy.

Remap: with EVENT_REMAP (asked for when an attached target has shared memory) what moves stays protected until
it is known to be lost. Remove: with EVENT_REMOVE, asked for only where nothing else tells what madvise()
discards (private mappings of memory files). Each such call waits for us, so does each munmap() with
EVENT_UNMAP; elsewhere what they take away is found by `pyx/engine/recheck`. (A peer's descriptor may bring
them.)
"""

from libc.errno cimport EAGAIN, EINTR, EMFILE, ENFILE, ENOENT, ESRCH, errno
from posix.unistd cimport close, read

from snapengine.base.atomics cimport snap_add, snap_leave, snap_load, snap_peek, snap_store, snap_swap
from snapengine.kernel.linux cimport (
    UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE,
    UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP,
)
from snapengine.kernel.procmap_query cimport next_vma, vma_t
from snapengine.base.pthreads cimport pthread_mutex_lock, pthread_mutex_unlock, snap_sleep_ns
from snapengine.engine.state cimport DEFERRED_MAX, UFFDS_MAX, capture_fail, region_t
from snapengine.engine.recheck cimport invalidate
from snapengine.kernel.uffd cimport protect_mapped, register_mapped, uffd_protect, uffd_unprotect, uffd_wake
from snapengine.engine.unregister cimport registered_until, unregister_all, unregister_range

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        unsigned int events
        epoll_data_t data
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    const int EPOLL_CTL_ADD
    const int EPOLL_CTL_MOD
    const unsigned int EPOLLIN
    const unsigned int EPOLLET

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int dup3(int old, int new, int flags)

cdef uint64_t NEVER_MAPPED = 0x7fffffffe000     # the last page of a process on x86-64 is a guard (ENOENT)

cdef extern from * nogil:
    """
    #include <linux/userfaultfd.h>
    static inline unsigned long long snap_remap_from(const struct uffd_msg *m) { return m->arg.remap.from; }
    static inline unsigned long long snap_remap_to(const struct uffd_msg *m) { return m->arg.remap.to; }
    static inline unsigned long long snap_remap_len(const struct uffd_msg *m) { return m->arg.remap.len; }
    static inline unsigned long long snap_removed(const struct uffd_msg *m) { return m->arg.remove.start; }
    static inline unsigned long long snap_removed_end(const struct uffd_msg *m) { return m->arg.remove.end; }
    """
    uint64_t snap_remap_from(const uffd_msg *message)
    uint64_t snap_remap_to(const uffd_msg *message)
    uint64_t snap_remap_len(const uffd_msg *message)
    uint64_t snap_removed(const uffd_msg *message)
    uint64_t snap_removed_end(const uffd_msg *message)


cdef int _control(capture_t *capture, int op, int fd, uint64_t word, unsigned int events) noexcept nogil:
    cdef epoll_event event
    event.events = events
    event.data.u64 = word
    return 0 if epoll_ctl(capture.epoll, op, fd, &event) == 0 else errno


cdef int watch(capture_t *capture, int fd, uint64_t word) noexcept nogil:
    # Edge-triggered for userfaultfds: a level wakes every fault thread for each fault, and all but one find
    # nothing (57 µs of CPU time a fault, against 25). Who is woken reads until there is no more.
    return _control(capture, EPOLL_CTL_ADD, fd, word, EPOLLIN | EPOLLET if word < UFFDS_MAX else EPOLLIN)


cdef int watch_target(capture_t *capture, bint on) noexcept nogil:
    """What came meanwhile is found: EPOLL_CTL_MOD polls the descriptor anew, edge-triggered or not."""
    return _control(capture, EPOLL_CTL_MOD, capture.uffds[0], 0, EPOLLIN | EPOLLET if on else EPOLLET)


cdef void wake_fault_threads(capture_t *capture) noexcept nogil:
    """Any thread. The first walker sees `called` at its next look."""
    watch_target(capture, True)
    snap_store(&capture.polling.wake_requested, 1)


cdef ssize_t _read(capture_t *capture, int uffd, uffd_msg *messages) noexcept nogil:
    """read(2). What a REMOVE event names is gone from then on: no copy is believed until that is noted."""
    cdef ssize_t got, i
    cdef uint64_t start
    cdef int err
    snap_add(&capture.recheck.event_readers, 1)
    got = read(uffd, messages, 64 * sizeof(uffd_msg))
    err = errno
    for i in range(got // <ssize_t>sizeof(uffd_msg) if got > 0 else 0):
        if messages[i].event == UFFD_EVENT_REMOVE and uffd == capture.uffds[0]:
            start = snap_removed(&messages[i])
            invalidate(capture, start, snap_removed_end(&messages[i]) - start, True)
    snap_leave(&capture.recheck.event_readers)
    return got if got >= 0 else -err


cdef int read_messages(capture_t *capture, int uffd, uffd_msg *messages) noexcept nogil:
    cdef ssize_t got
    cdef uint64_t spare
    cdef int err
    while True:
        got = _read(capture, uffd, messages)
        if got >= 0:
            return <int>(got // <ssize_t>sizeof(uffd_msg))
        err = <int>-got
        if err == EAGAIN:           # another thread took them; also the answer for a dead target
            return 0
        if err == EMFILE or err == ENFILE:
            # A fork event brings a descriptor, and there is no room for it. It must be read all the same,
            # or the fork never returns: the reserved place is given up for it, and the capture fails.
            spare = snap_swap(&capture.spare_fd, <uint64_t>-1)
            capture_fail(capture, EMFILE, "no descriptor is left for a fork of the target", 0)
            if spare == <uint64_t>-1:
                return 0
            close(<int>spare)
        elif err != EINTR:
            capture_fail(capture, err, "read of the userfaultfd", 0)
            return 0


cdef bint _has_shared(capture_t *capture) noexcept nogil:
    cdef int i
    for i in range(capture.n_regions):
        if capture.regions[i].shared:
            return True
    return False


cdef int protect_left(capture_t *capture, int fd, uint64_t addr, uint64_t length) noexcept nogil:
    """What is left of it in a forked child, whose mappings we cannot ask for."""
    return protect_mapped(fd, -1, &capture.failed, addr, length)


cdef int _protect_region(capture_t *capture, int fd, region_t *region) noexcept nogil:
    """Also what the parent had not registered yet when it forked (ENOENT)."""
    cdef uint64_t length = region.track_end - region.track_start
    cdef uint64_t mode = UFFDIO_REGISTER_MODE_WP | (UFFDIO_REGISTER_MODE_MISSING if region.missing else 0)
    cdef int err = uffd_protect(fd, region.track_start, length)
    if err != ENOENT:
        return err
    err = register_mapped(fd, -1, &capture.failed, region.track_start, length, region.unit_pages * 4096, mode)
    return err if err else protect_left(capture, fd, region.track_start, length)


cdef void _read_of(capture_t *capture, int fd) noexcept nogil:
    """What a child does that is not in the list yet: it runs from when its own fork was read of."""
    cdef uffd_msg messages[64]
    cdef int i, n
    n = read_messages(capture, fd, messages)
    for i in range(n):
        if messages[i].event == UFFD_EVENT_FORK:
            _adopt_child(capture, <int>messages[i].arg.fork.ufd)
        elif messages[i].event == UFFD_EVENT_REMAP:
            unregister_range(capture, fd, snap_remap_to(&messages[i]),
                             snap_remap_to(&messages[i]) + snap_remap_len(&messages[i]))
        elif messages[i].event == UFFD_EVENT_PAGEFAULT:     # it faults again, and then it is in the list
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

    Of a child that has ended the place is taken over, and its descriptor's number with it: another thread
    that still reads from that gets the new child's messages, with the right index.
    """
    cdef int i
    cdef uint64_t n = snap_peek(&capture.n_uffds)
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
    """Until T the child must be protected as its parent is: the fork may have copied page tables
    between two protect calls. After T it inherited exactly what is still protected."""
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


cdef void _let_move(capture_t *capture, uint64_t uffd, const uffd_msg *message) noexcept nogil:
    """The moved pages keep their protection; they cannot be saved by their new address: let them go. What is
    not saved yet is lost, and must be known to be before a writer goes on at the new place."""
    cdef uint64_t start = snap_remap_to(message)
    cdef uint64_t length = snap_remap_len(message)
    cdef uint64_t end = start + length
    cdef vma_t place
    if uffd == 0:
        invalidate(capture, snap_remap_from(message), length, False)
        invalidate(capture, start, length, False)
        # It may have grown on the way: all of it, or it would be in two, and cannot be moved again as one.
        if capture.attached and not next_vma(capture.maps, start, &place) and place.start <= start:
            end = registered_until(capture, start + length, max(end, place.end))
    unregister_range(capture, capture.uffds[uffd], start, end)


cdef void handle_event(capture_t *capture, uint64_t uffd, const uffd_msg *message) noexcept nogil:
    if message.event == UFFD_EVENT_FORK:
        _adopt_child(capture, <int>message.arg.fork.ufd)
    elif message.event == UFFD_EVENT_REMAP:
        _let_move(capture, uffd, message)
    # UNMAP: reading the message lets the caller go on; the pages are found lost. REMOVE: see read_messages.


cdef void defer_fault(capture_t *capture, lane_t *lane, uint64_t uffd,
                      const uffd_msg *message) noexcept nogil:
    if lane.n_deferred < DEFERRED_MAX:
        lane.deferred[lane.n_deferred] = message[0]
        lane.deferred_uffd[lane.n_deferred] = <unsigned int>uffd
        lane.n_deferred += 1
    else:                           # no room: it faults again
        uffd_wake(capture.uffds[uffd], message.arg.pagefault.address & ~<uint64_t>4095, 4096)


cdef void drain_events(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef uffd_msg messages[64]
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


cdef void _await_events(capture_t *capture, lane_t *lane, int fd) noexcept nogil:
    """Read what is still to come. A fork that has begun answers EAGAIN here until its event is read; closing
    would not end its wait, since the child that it makes holds a copy of the descriptor already."""
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
            _await_events(capture, lane, fd)
        # Before the close: a child forked in between must not close a reused descriptor.
        capture.uffds[index] = -1
        if fd >= 0:
            close(fd)
        index += 1
    lane.n_deferred = 0                 # unregistering woke them
    snap_store(&capture.n_uffds, 1)
