from libc.stdint cimport uint64_t

from snapengine.kernel.linux cimport uffd_msg
from snapengine.engine.state cimport capture_t, lane_t

# epoll data words; uffds use their index in capture.uffds.
cdef enum:
    WATCH_STOP = 1000
    WATCH_PID = 1001

# Read up to 64 messages of one uffd: their number, 0 if there are none now.
cdef int read_messages(capture_t *capture, int uffd, uffd_msg *messages) noexcept nogil
# The first walker may be looking for faults itself (`pyx/engine/polling`): let the fault threads serve as
# well.
cdef void wake_fault_threads(capture_t *capture) noexcept nogil
# Deal with a message that is not a page fault (fork, remap, remove, unmap).
cdef void handle_event(capture_t *capture, uint64_t uffd, const uffd_msg *message) noexcept nogil
# Protect what of the range is still mapped and registered with this userfaultfd. 0 or errno.
cdef int protect_left(capture_t *capture, int fd, uint64_t addr, uint64_t length) noexcept nogil
# Keep a fault in lane.deferred for later.
cdef void defer_fault(capture_t *capture, lane_t *lane, uint64_t uffd,
                      const uffd_msg *message) noexcept nogil
# Read what is pending on every uffd: events are dealt with, faults go to lane.deferred.
cdef void drain_events(capture_t *capture, lane_t *lane) noexcept nogil
# Watch a descriptor with the capture's epoll. 0 or errno.
cdef int watch(capture_t *capture, int fd, uint64_t word) noexcept nogil
# Let the epoll wake no one for the target's own userfaultfd, or (`on`) wake again. 0 or errno.
cdef int watch_target(capture_t *capture, bint on) noexcept nogil
# Unregister and close every userfaultfd of the capture: after it nothing is protected, nobody waits.
cdef void close_all(capture_t *capture, lane_t *lane) noexcept nogil
