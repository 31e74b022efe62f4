from libc.stdint cimport uint64_t

# Copy the page at src to dst (both 4096 bytes, any alignment); non-zero if it holds anything but zeros.
cdef int copy_page(char *dst, const char *src) noexcept nogil
# Whether the page at src holds anything but zeros.
cdef int page_nonzero(const char *src) noexcept nogil
