from libc.stdint cimport uint64_t

from snapengine.kernel.pagemap cimport scan_t
from snapengine.engine.state cimport capture_t, lane_t, region_t


cdef struct run_t:                  # regions, by address, with nothing mapped between them when listed
    region_t *first
    int n


# The part of [start, end) that is the region's; False: none of it.
cdef bint clip(region_t *region, uint64_t *start, uint64_t *end) noexcept nogil
# Note what of [start, end) is the region's as populated, or as not.
cdef void set_present(capture_t *capture, region_t *region, uint64_t start, uint64_t end,
                      bint present) noexcept nogil
cdef void begin_scan(capture_t *capture, scan_t *scan, uint64_t start, uint64_t end, uint64_t mask,
                     uint64_t anyof, uint64_t returned) noexcept nogil
# Note what is populated in [start, end), and what of it is huge. 0 or errno.
cdef int scan_populated(capture_t *capture, lane_t *lane, run_t run, uint64_t start,
                        uint64_t end) noexcept nogil
# At T: what there is neither protected nor populated is no page of it. 0 or errno.
cdef int take_out_unprotected(capture_t *capture, lane_t *lane, run_t run, uint64_t start,
                              uint64_t end) noexcept nogil
