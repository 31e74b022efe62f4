from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

# Exactly `count` bytes at `offset`. Returns 0, an errno, or -1 for an early end of file.
cdef int pread_all(int fd, void *data, size_t count, uint64_t offset) noexcept nogil
# The same for writing. Returns 0 or an errno.
cdef int pwrite_all(int fd, const char *data, size_t count, uint64_t offset) noexcept nogil
# Its size in bytes; 0 if it cannot be told.
cdef uint64_t file_size(int fd) noexcept nogil
