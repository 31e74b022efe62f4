from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

# Reads exactly `count` bytes at `offset` into memory. It may be the program's: EFAULT if it was unmapped.
# Returns 0, an errno, or -1 if the source ends earlier. Any number of threads may call it at once.
ctypedef int (*source_read_t)(void *self, void *into, size_t count, uint64_t offset) noexcept nogil


cdef struct source_t:
    source_read_t read
    void *self              # first argument of `read`; owned by the Source that contains this struct
    uint64_t size           # bytes, as of opening


cdef inline int source_read(const source_t *source, void *into, size_t count, uint64_t offset) noexcept nogil:
    return source.read(source.self, into, count, offset)


cdef class Source:
    # `at` is valid as long as the caller holds a reference to the Source. source.pyx describes the ownership.
    cdef readonly str name
    cdef source_t at
    cdef object error       # last exception of a `pread` in Python
    # Raises the exception for a non-zero result of `source_read`.
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
