from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

# Exactly `count` bytes at `offset` into memory that may be the caller's: it may be gone, which is EFAULT.
# Returns 0, an errno, or -1: the source ends before that. Any number of threads may call it at once.
ctypedef int (*source_read_t)(void *self, void *into, size_t count, uint64_t offset) noexcept nogil


cdef struct source_t:
    source_read_t read
    void *self              # what `read` gets; belongs to the Source that this struct is in
    uint64_t size           # bytes, when it was opened


cdef inline int source_read(const source_t *source, void *into, size_t count, uint64_t offset) noexcept nogil:
    return source.read(source.self, into, count, offset)


cdef class Source:
    # Read `at` as long as you hold a reference to the Source: source.pyx says who closes it, and when.
    cdef readonly str name
    cdef source_t at
    cdef object error       # what a read by Python raised last
    # Raises what a result of `source_read` other than 0 means.
    cdef int failed(self, int err, uint64_t offset) except -1 with gil


cdef class FileSource(Source):
    cdef readonly int fd    # -1: closed
    cdef object descriptor


cdef struct memory_t:
    const char *data
    uint64_t length
    bint is_open


cdef class MemorySource(Source):
    cdef Py_buffer view     # valid while `is_open`
    cdef memory_t memory
