from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, region_t

# Whether the memory behind a page of a shared region exists now; swapped pages exist. If the query fails, the
# answer is yes.
cdef bint page_exists(region_t *region, uint64_t page) noexcept nogil
# PRESENCE_MINCORE: which pages of `mask`, in the 64-page window at `page`, are in the page cache. Swapped
# pages are not, so the region plan selects this only where no page can be swapped.
cdef uint64_t resident(region_t *region, uint64_t page, uint64_t mask) noexcept nogil
# Add the existing pages of a shared region to `present`.
cdef void add_existing(capture_t *capture, region_t *region) noexcept nogil
