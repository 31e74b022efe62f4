from libc.stddef cimport size_t
from libc.stdint cimport uint64_t
from posix.uio cimport iovec

from snapengine.image.restorer cimport Restorer, destination_t

cdef enum:
    BATCH = 256                        # pages per writev


cdef class PageSender(Restorer):
    # Writes the pages of one RAM block as records of a migration stream, in the order of the image's chunks.
    cdef int out
    cdef bint named                    # a record has named the block; later records use RAM_CONTINUE
    cdef uint64_t first_page
    cdef bytes block_name
    cdef char first_head[8 + 1 + 255]
    cdef char heads[BATCH][8]
    cdef iovec parts[2 * BATCH]
    cdef int queued
    cdef readonly uint64_t data_pages
    cdef readonly uint64_t zero_pages
    cdef readonly uint64_t sent_bytes

    cdef int add(self, uint64_t page, const char *data, size_t length, uint64_t flag) except -1 nogil
    cdef int flush(self) except -1 nogil
    cdef int write_failed(self, int err) except -1 with gil
