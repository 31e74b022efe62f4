from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t

# First walker, after that: holes of shared memory that have filled since `note_again` exist at T.
cdef void note_filled_holes(capture_t *capture) noexcept nogil
# First walker, after that: a fault is noted for one region; where others have bytes in the same page, it was
# hit for them, too.
cdef void share_edges(capture_t *capture) noexcept nogil
# Walkers, after that: protect again what was hit, in pieces (`parallel.pxd`), and how many of them there are.
cdef void reprotect(capture_t *capture, lane_t *lane, uint64_t piece) noexcept nogil
cdef uint64_t reprotect_pieces(capture_t *capture) noexcept nogil
