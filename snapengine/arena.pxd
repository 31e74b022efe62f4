from libc.stdint cimport uint64_t


cdef class Arena:
    # Zeroed memory of its own mapping, for what capture threads write.
    cdef readonly uint64_t length         # bytes
    cdef char *base
