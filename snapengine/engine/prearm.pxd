from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

# Whether a fault may be answered now: T is fixed, or what is hit before it is noted.
cdef bint may_serve(capture_t *capture) noexcept nogil
# Fault threads, before T: remember the page of a fault (with its unit, or a run), and say what to let go.
cdef void prearm_fault(capture_t *capture, region_t *region, uint64_t page, uint64_t *first,
                       uint64_t *n) noexcept nogil
# First walker: from now on no fault is answered. Returns when none is being answered any more.
cdef void prearm_stop(capture_t *capture) noexcept nogil
