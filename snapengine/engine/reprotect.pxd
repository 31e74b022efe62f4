from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t

# First walker, after prearm_stop: holes of shared memory that have filled since `note_again` exist at T.
cdef void note_filled_holes(capture_t *capture) noexcept nogil
# First walker, after prearm_stop: a fault is recorded for one region. If other regions have bytes in the same
# page, set it dirty for them, too.
cdef void share_edges(capture_t *capture) noexcept nogil
# Walkers, after that: protect the dirty pages of one piece again (`parallel.pxd`); the number of pieces.
cdef void reprotect(capture_t *capture, lane_t *lane, uint64_t piece) noexcept nogil
cdef uint64_t reprotect_pieces(capture_t *capture) noexcept nogil
