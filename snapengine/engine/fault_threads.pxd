from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t

# Thread body; the argument is a lane_t.
cdef void *fault_thread(void *arg) noexcept nogil
# Read up to 64 messages of a userfaultfd, seen at that time, and serve them: whether there were any.
cdef bint serve_round(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t seen) noexcept nogil
# Give a missing page its zeros and wake who waits for it; if it existed at T, no copy of it is believed.
cdef void fill_missing(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t addr) noexcept nogil
# Wait for T, or (`prearming`) for the time when faults are noted. False if the capture ended before.
cdef bint await_arming(capture_t *capture, bint prearming) noexcept nogil
# Answer missing faults that wait, and only those: for the walk while it waits for the fault threads.
cdef void answer_missing(capture_t *capture, lane_t *lane) noexcept nogil
# Serve the faults that the lane holds back.
cdef void serve_deferred(capture_t *capture, lane_t *lane) noexcept nogil
