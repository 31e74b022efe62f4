from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t

# Registered, not yet protected: note what is populated where only faults can change that.
cdef void scan_before(capture_t *capture, lane_t *lane, uint64_t span) noexcept nogil
# At T: `present` and `huge` as they are.
cdef void scan_at_t(capture_t *capture, lane_t *lane, uint64_t span) noexcept nogil
# Dirty logging, when the target stands: `present` as it is, from nothing. 0 or errno.
cdef int scan_anew(capture_t *capture, lane_t *lane) noexcept nogil
