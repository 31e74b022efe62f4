from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

# Whether a fault may be served now: T is fixed, or pre-arming is active.
cdef bint may_serve(capture_t *capture) noexcept nogil
# Fault threads, before T: record the page of a fault as dirty, with its unit or a run. Sets first and n, the
# pages to release.
cdef void prearm_fault(capture_t *capture, region_t *region, uint64_t page, uint64_t *first,
                       uint64_t *n) noexcept nogil
# First walker: end pre-arming. Returns when no fault thread serves a fault any more.
cdef void prearm_stop(capture_t *capture) noexcept nogil
