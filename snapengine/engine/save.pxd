from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

# The unit that holds `page`: pages that are claimed, saved and released together. Sets first and n (1 for a
# 4 KiB page), clamped to the region.
cdef void unit_of(capture_t *capture, region_t *region, uint64_t page, uint64_t *first,
                  uint64_t *n) noexcept nogil
# Claim a whole unit: True for the one thread that wins it.
cdef bint claim_unit(capture_t *capture, uint64_t first, uint64_t n) noexcept nogil
# Save, then release, pages that the caller has claimed. The lane must have room for them. 0, or an errno: the
# capture has failed. `data`: the pages of `won` that are populated. Determine them before the claim: once a
# page is claimed, a fault thread may fill a hole for the writer that waits for it, and then it looks
# populated.
cdef int save_window(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                     uint64_t won, uint64_t data) noexcept nogil
# The two halves of save_window, for a window that is copied in parts and released at once.
cdef int copy_claimed(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                      uint64_t won, uint64_t data) noexcept nogil
cdef void publish(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                  uint64_t won, uint64_t data) noexcept nogil
cdef int save_unit(capture_t *capture, lane_t *lane, region_t *region, uint64_t first,
                   uint64_t n) noexcept nogil
# Unprotect and wake, through the userfaultfd with index `uffd`.
cdef void release(capture_t *capture, lane_t *lane, uint64_t uffd, uint64_t addr,
                  uint64_t length) noexcept nogil
# The address range of the unit that begins at page `first`, for release().
cdef void unit_range(region_t *region, uint64_t first, uint64_t n, uint64_t *addr,
                     uint64_t *length) noexcept nogil
