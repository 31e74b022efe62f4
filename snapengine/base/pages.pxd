from libc.stdint cimport uint32_t

# Copy the page at src to dst (4096 bytes, any alignment). Returns non-zero unless the page is all zero.
cdef int copy_page(char *dst, const char *src) noexcept nogil
# Whether the page at src has a non-zero byte.
cdef int page_nonzero(const char *src) noexcept nogil
# Copy a page. Unless it is all zero, continue the CRC-32C at `crc` over it and return non-zero.
cdef int copy_page_sum(char *dst, const char *src, uint32_t *crc) noexcept nogil
