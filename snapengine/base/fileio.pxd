from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

# Read exactly `count` bytes at `offset`. Returns 0, an errno, or -1 at an early end of file.
cdef int pread_all(int fd, void *data, size_t count, uint64_t offset) noexcept nogil
# Write `count` bytes at `offset`. Returns 0 or an errno.
cdef int pwrite_all(int fd, const char *data, size_t count, uint64_t offset) noexcept nogil
# Size of the file in bytes; 0 if fstat(2) fails.
cdef uint64_t file_size(int fd) noexcept nogil
