from libc.stdint cimport uint64_t

from snapengine.kernel.linux cimport uffd_msg
from snapengine.engine.state cimport capture_t, lane_t

# Read up to 64 messages of one uffd: their number, 0 if there are none now.
cdef int read_messages(capture_t *capture, int uffd, uffd_msg *messages) noexcept nogil
# Deal with a message that is not a page fault (fork, remap, remove, unmap).
cdef void handle_event(capture_t *capture, uint64_t uffd, const uffd_msg *message) noexcept nogil
# Protect what of the range is still mapped and registered with this userfaultfd. 0 or errno.
cdef int protect_left(capture_t *capture, int fd, uint64_t addr, uint64_t length) noexcept nogil
# Keep a fault in lane.deferred for later.
cdef void defer_fault(capture_t *capture, lane_t *lane, uint64_t uffd,
                      const uffd_msg *message) noexcept nogil
# Read what is pending on every uffd: events are dealt with, faults go to lane.deferred.
cdef void drain_events(capture_t *capture, lane_t *lane) noexcept nogil
# Unregister and close every userfaultfd of the capture: after it nothing is protected, nobody waits.
cdef void close_all(capture_t *capture, lane_t *lane) noexcept nogil
