from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t

# Thread body; the argument is a lane_t.
cdef void *fault_thread(void *arg) noexcept nogil
# Read up to 64 messages of the userfaultfd with index `uffd` and serve them. False if there were none.
# `seen`: the time of the read, in ns, from which service times are counted.
cdef bint serve_round(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t seen) noexcept nogil
# Fill a missing page with zeros and wake the threads that wait for it. If the page existed at T, later copies
# of it are invalid.
cdef void fill_missing(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t addr) noexcept nogil
# Wait for T or, with `prearming`, for pre-arming to begin. False if the capture has ended before.
cdef bint await_arming(capture_t *capture, bint prearming) noexcept nogil
# Fill the pages of pending missing faults. Pending write faults wait until their memory is unregistered. For
# the first walker while it waits for the fault threads, and for dirty logging.
cdef void answer_missing(capture_t *capture, lane_t *lane) noexcept nogil
# Serve the lane's deferred faults, if faults may be served now.
cdef void serve_deferred(capture_t *capture, lane_t *lane) noexcept nogil
