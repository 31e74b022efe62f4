from libc.stddef cimport size_t
from libc.stdint cimport uint32_t

# CRC-32C of `length` bytes at `data`, continued from `crc` (initially 0).
cdef uint32_t crc32c(uint32_t crc, const void *data, size_t length) noexcept nogil
