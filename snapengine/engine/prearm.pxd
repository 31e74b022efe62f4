from libc.stdint cimport uint64_t

from snapengine.engine.session cimport capture_t, lane_t, region_t

# Whether a fault may be answered now: T is fixed, or what is hit before it is noted.
cdef bint may_serve(capture_t *capture) noexcept nogil
# Fault threads, before T: remember the page of a fault (with its unit, or a run), and say what to let go.
cdef void note_hit(capture_t *capture, region_t *region, uint64_t page, uint64_t *first,
                   uint64_t *n) noexcept nogil
# First walker: from now on no fault is answered. Returns when none is being answered any more.
cdef void stop_noting(capture_t *capture) noexcept nogil
# First walker, after that: holes of shared memory that have filled since `note_again` exist at T.
cdef void note_filled_holes(capture_t *capture) noexcept nogil
# First walker, after that: a fault is noted for one region; where others have bytes in the same page, it was
# hit for them, too.
cdef void share_edges(capture_t *capture) noexcept nogil
# Walkers, after that: protect again what was hit, in pieces (`pieces.pxd`), and how many of them there are.
cdef void protect_hits(capture_t *capture, lane_t *lane, uint64_t piece) noexcept nogil
cdef uint64_t hit_pieces(capture_t *capture) noexcept nogil
