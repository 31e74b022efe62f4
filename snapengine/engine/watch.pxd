from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t

# epoll data words; uffds use their index in capture.uffds.
cdef enum:
    WATCH_STOP = 1000
    WATCH_PID = 1001

# Add a descriptor to the capture's epoll. 0 or errno.
cdef int watch(capture_t *capture, int fd, uint64_t word) noexcept nogil
# Stop or (`on`) restart wake-ups for the target's own userfaultfd. 0 or errno.
cdef int watch_target(capture_t *capture, bint on) noexcept nogil
# Let the fault threads serve faults, too, if the first walker polls for them (`pyx/engine/polling`).
cdef void wake_fault_threads(capture_t *capture) noexcept nogil
