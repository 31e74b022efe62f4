from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

# The pages in `mask`, of the 64-page window at `page` (a multiple of 64), that hold data.
cdef uint64_t populated(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                        uint64_t mask) noexcept nogil
# The first page from `page` on that may hold data, according to the region's file if it is sparse; else
# `page`.
cdef uint64_t data_from(region_t *region, uint64_t page) noexcept nogil
# Append pages page .. page + n - 1 to the lane as data, zero or lost. The lane must have room for them. 0, or
# an errno that ends the capture.
cdef int copy_run(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                  uint64_t n) noexcept nogil
# The same for the pages in `mask`, not 0, of the 64-page window at `page`.
cdef int copy_window(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                     uint64_t mask) noexcept nogil
# Append pages that need no copy (hole, zero, lost), or record a page that was copied.
cdef void put_pages(capture_t *capture, lane_t *lane, uint64_t page, uint64_t n, unsigned kind) noexcept nogil
