from libc.stdint cimport uint64_t


cdef class Arena:
    # Zeroed memory in a mapping of its own, for the data that capture threads write.
    cdef readonly uint64_t length         # bytes
    cdef char *base
    cdef void mark_free(self)


cdef class FileView:
    # A read-only shared mapping of a file.
    cdef readonly uint64_t addr
    cdef readonly uint64_t length         # bytes
