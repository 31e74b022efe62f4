from libc.stdint cimport uint64_t

from snapengine.session cimport capture_t

# How many pages from `page` on a write fault there should take: 1 to `most`.
cdef uint64_t run_for(capture_t *capture, uint64_t page, uint64_t most) noexcept nogil
