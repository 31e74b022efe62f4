from libc.stdint cimport uint32_t

# Copy the page at src to dst (both 4096 bytes, any alignment); non-zero if it holds anything but zeros.
cdef int copy_page(char *dst, const char *src) noexcept nogil
# Whether the page at src holds anything but zeros.
cdef int page_nonzero(const char *src) noexcept nogil
# Copy a page, and if it holds anything but zeros continue the CRC-32C at `crc` with it and return non-zero.
cdef int copy_page_sum(char *dst, const char *src, uint32_t *crc) noexcept nogil
