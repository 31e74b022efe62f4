"""Which descriptors wake the fault threads: the capture's epoll.

Any capture thread may call these functions; the kernel serializes epoll_ctl(2).
"""

from libc.errno cimport errno

from snapengine.base.atomics cimport snap_store
from snapengine.engine.state cimport UFFDS_MAX

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


cdef int _control(capture_t *capture, int op, int fd, uint64_t word, unsigned int events) noexcept nogil:
    cdef epoll_event event
    event.events = events
    event.data.u64 = word
    return 0 if epoll_ctl(capture.epoll, op, fd, &event) == 0 else errno


cdef int watch(capture_t *capture, int fd, uint64_t word) noexcept nogil:
    # Edge-triggered for userfaultfds: level-triggered, each fault wakes all fault threads, and all but one
    # find nothing (57 µs of CPU time a fault, against 25). A woken thread reads until nothing is left.
    return _control(capture, EPOLL_CTL_ADD, fd, word, EPOLLIN | EPOLLET if word < UFFDS_MAX else EPOLLIN)


cdef int watch_target(capture_t *capture, bint on) noexcept nogil:
    """No message is missed: EPOLL_CTL_MOD polls the descriptor again, edge-triggered or not."""
    return _control(capture, EPOLL_CTL_MOD, capture.uffds[0], 0, EPOLLIN | EPOLLET if on else EPOLLET)


cdef void wake_fault_threads(capture_t *capture) noexcept nogil:
    """The first walker sees `wake_requested` at its next poll."""
    watch_target(capture, True)
    snap_store(&capture.polling.wake_requested, 1)
