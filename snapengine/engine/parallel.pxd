from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

ctypedef void (*piece_work_t)(capture_t *capture, lane_t *lane, uint64_t piece) noexcept nogil

# First walker: all walkers call `work` for the pieces 0 ... pieces - 1. Returns when all pieces are done, or
# when the capture has failed and no piece is in progress.
cdef void run_parallel(capture_t *capture, lane_t *lane, piece_work_t work, uint64_t pieces) noexcept nogil
# First walker, when the pause begins: until T, walkers wait for pieces and for each other without sleeping.
cdef void begin_spinning(capture_t *capture) noexcept nogil
# Other walkers: take pieces until T is fixed or the capture ends.
cdef void help_parallel(capture_t *capture, lane_t *lane) noexcept nogil

# Spans: pieces of `span_pages` page numbers. The number of spans.
cdef uint64_t spans(capture_t *capture) noexcept nogil
# The index of the first region that ends beyond `page`; n_regions if none does.
cdef int first_region(capture_t *capture, uint64_t page) noexcept nogil
# The part [first, end) of a region that lies in a span; False if none does.
cdef bint span_of(capture_t *capture, region_t *region, uint64_t span, uint64_t *first,
                  uint64_t *end) noexcept nogil
