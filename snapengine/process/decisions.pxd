from libc.stdint cimport uint64_t

from snapengine.kernel.procmaps_line cimport Mapping


cdef class Decision:                    # what is done with one mapping
    cdef public Mapping mapping
    cdef public str action
    cdef public str reason
    cdef public str name
    cdef public str kind
    cdef public uint64_t page_size
    cdef public str way
    cdef public uint64_t cost
    cdef public bint whole
    cdef public uint64_t zero_inode
    cdef Decision of(self, Mapping mapping)     # the same for another mapping
