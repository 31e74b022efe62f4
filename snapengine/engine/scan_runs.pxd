from libc.stdint cimport uint64_t

from snapengine.kernel.pagemap cimport scan_t
from snapengine.engine.state cimport capture_t, lane_t, region_t


cdef struct run_t:                  # regions by address; when listed, nothing was mapped between them
    region_t *first
    int n


# Limit [start, end) to the region's pages; False if nothing is left.
cdef bint clip(region_t *region, uint64_t *start, uint64_t *end) noexcept nogil
# Record the region's pages in [start, end) as populated or not.
cdef void set_present(capture_t *capture, region_t *region, uint64_t start, uint64_t end,
                      bint present) noexcept nogil
cdef void begin_scan(capture_t *capture, scan_t *scan, uint64_t start, uint64_t end, uint64_t mask,
                     uint64_t anyof, uint64_t returned) noexcept nogil
# Record the populated pages and huge pages in [start, end). 0 or errno.
cdef int scan_populated(capture_t *capture, lane_t *lane, run_t run, uint64_t start,
                        uint64_t end) noexcept nogil
# At T: remove the pages in [start, end) that are neither protected nor populated from `present`. 0 or errno.
cdef int remove_unprotected(capture_t *capture, lane_t *lane, run_t run, uint64_t start,
                            uint64_t end) noexcept nogil
