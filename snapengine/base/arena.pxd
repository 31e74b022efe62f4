from libc.stdint cimport uint64_t


cdef class Arena:
    # Zeroed memory of its own mapping, for what capture threads write.
    cdef readonly uint64_t length         # bytes
    cdef char *base
    cdef void lend(self)


cdef class FileView:
    # A read-only shared mapping of a file, by its address.
    cdef readonly uint64_t addr
    cdef readonly uint64_t length         # bytes
