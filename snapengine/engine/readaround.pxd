from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

# How many pages, starting at `page`, a write fault there should take: 1 to `most`, more for sequential
# writers.
cdef uint64_t run_from(capture_t *capture, uint64_t page, uint64_t most) noexcept nogil
# Which pages of its 64-page window a write fault at `page` should take: sets first and n. After T.
cdef void run_around(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t *first,
                     uint64_t *n) noexcept nogil
