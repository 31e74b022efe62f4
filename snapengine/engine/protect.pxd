from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t

# UFFDIO_WRITEPROTECT with MODE_WP. Skips the parts that an attached target has unmapped. 0, or an errno: the
# capture has failed.
cdef int protect_range(capture_t *capture, lane_t *lane, uint64_t addr, uint64_t length) noexcept nogil
