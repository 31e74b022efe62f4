from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, region_t

# Note what the checks below compare with. Called twice: before anything is protected, and right after T.
# 0 or errno.
cdef int note_before(capture_t *capture) noexcept nogil
cdef int note_at_t(capture_t *capture) noexcept nogil
# Two-step, before T: note anew where the target has punched its files since.
cdef void note_again(capture_t *capture) noexcept nogil
# Whether the page of a missing fault exists: it was answered already, and is not missing.
cdef bint is_late(region_t *region, uint64_t page) noexcept nogil
# Before a missing page is filled.
cdef void note_missing(capture_t *capture, uint64_t addr) noexcept nogil
# hugetlb files: map here the unit at `page`, if the target has mapped it (0 or errno); whether the target has
# punched it out since, which is forgotten then.
cdef int populate_shadow(capture_t *capture, region_t *region, uint64_t page) noexcept nogil
cdef bint drop_shadow(capture_t *capture, region_t *region, uint64_t page) noexcept nogil
# Whether the copies of pages page .. page + n - 1, just made, are all what the pages held at T.
cdef bint still_valid(capture_t *capture, region_t *region, uint64_t page, uint64_t n) noexcept nogil
# The same of the pages in `mask`, not 0, of the 64-page window at `page`.
cdef bint all_still_valid(capture_t *capture, region_t *region, uint64_t page, uint64_t mask) noexcept nogil
# Whether a page of shared memory that existed at T, and reads as zero, has been punched out since.
cdef bint punched(capture_t *capture, region_t *region, uint64_t page) noexcept nogil
# The target takes [start, start + length) away, or puts something there: no later copy of it is believed.
# `own`: only in private mappings of memory files.
cdef void invalidate(capture_t *capture, uint64_t start, uint64_t length, bint own) noexcept nogil
