from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

ctypedef void (*piece_work_t)(capture_t *capture, lane_t *lane, uint64_t piece) noexcept nogil

# First walker: have `work` done for the pieces 0 ... pieces - 1 by all walkers; returns when all are done, or
# the capture has failed and none is under way.
cdef void run_parallel(capture_t *capture, lane_t *lane, piece_work_t work, uint64_t pieces) noexcept nogil
# The pause begins: until T, wait for pieces and for each other without sleeping.
cdef void begin_spinning(capture_t *capture) noexcept nogil
# Other walkers: help with that until T is fixed or the capture ends.
cdef void help_parallel(capture_t *capture, lane_t *lane) noexcept nogil

# Spans of `span_pages` page numbers, as pieces: how many there are, the first region that ends behind `page`,
# and what of a region lies in a span: [first, end), False if nothing does.
cdef uint64_t spans(capture_t *capture) noexcept nogil
cdef int first_region(capture_t *capture, uint64_t page) noexcept nogil
cdef bint span_of(capture_t *capture, region_t *region, uint64_t span, uint64_t *first,
                  uint64_t *end) noexcept nogil
