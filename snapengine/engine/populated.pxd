from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t

# After the registration, before the protection: find the populated pages of memory that only faults can fill.
cdef void scan_before(capture_t *capture, lane_t *lane, uint64_t span) noexcept nogil
# At T: complete `present` and `huge`.
cdef void scan_at_t(capture_t *capture, lane_t *lane, uint64_t span) noexcept nogil
# Dirty logging, while the target is stopped: clear `present` and find the populated pages again. 0 or errno.
cdef int rescan_all(capture_t *capture, lane_t *lane) noexcept nogil
