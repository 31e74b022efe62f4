from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, region_t

# Whether the memory behind a page of a shared region exists now (swapped out counts). An answer that tells
# nothing counts as yes.
cdef bint page_exists(region_t *region, uint64_t page) noexcept nogil
# Which pages of `mask`, of the 64-page window at `page`, are in the page cache (PRESENCE_MINCORE: what is
# swapped out is not, so plan takes it only where nothing can be).
cdef uint64_t resident(region_t *region, uint64_t page, uint64_t mask) noexcept nogil
# Add to `present` what exists of a shared region.
cdef void add_existing(capture_t *capture, region_t *region) noexcept nogil
