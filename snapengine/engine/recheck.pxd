from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, region_t

# Record the state that the checks below compare with: before anything is protected, and right after T.
# 0 or errno.
cdef int note_before(capture_t *capture) noexcept nogil
cdef int note_at_t(capture_t *capture) noexcept nogil
# Two-step arming, before T: record again which pages of files exist, since the target may have punched them.
cdef void note_again(capture_t *capture) noexcept nogil
# Whether the page of a missing fault exists: another answer has filled it already.
cdef bint is_late(region_t *region, uint64_t page) noexcept nogil
# Invalidate a missing page that existed at T. Call this before the page is filled.
cdef void note_missing(capture_t *capture, uint64_t addr) noexcept nogil
# hugetlb files: populate the unit at `page` in the shadow mapping, if the target has mapped it. 0 or errno.
cdef int populate_shadow(capture_t *capture, region_t *region, uint64_t page) noexcept nogil
# hugetlb files: whether the target has punched out the unit since. Then it counts as not populated again.
cdef bint drop_shadow(capture_t *capture, region_t *region, uint64_t page) noexcept nogil
# Whether the copies of pages page .. page + n - 1, just made, all hold what the pages held at T.
cdef bint still_valid(capture_t *capture, region_t *region, uint64_t page, uint64_t n) noexcept nogil
# The same for the pages in `mask`, not 0, of the 64-page window at `page`.
cdef bint all_still_valid(capture_t *capture, region_t *region, uint64_t page, uint64_t mask) noexcept nogil
# Whether a page of shared memory that existed at T, and reads as zero, has been punched out since.
cdef bint punched(capture_t *capture, region_t *region, uint64_t page) noexcept nogil
# The target discards or replaces [start, start + length): later copies of it are invalid. `own`: only in
# private mappings of memory files.
cdef void invalidate(capture_t *capture, uint64_t start, uint64_t length, bint own) noexcept nogil
