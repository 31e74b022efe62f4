from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t


cdef struct run_t:
    uint64_t page        # image page number
    uint64_t pages
    uint32_t chunk       # which chunk, in the order of the file
    uint32_t entry       # which entry of its page map
    uint32_t data_page   # DATA: index of the first page in the chunk's payload
    uint32_t kind        # SNAP_DATA ... SNAP_LOST


cdef class Runs:
    # What the image says about a range of pages: ascending, without overlap, last record wins.
    cdef run_t *runs
    cdef size_t count
    cdef size_t room
    cdef int append(self, const run_t *run) noexcept nogil   # 0 or -1 (no memory)


# Page by page the newest of `items`, ascending. Takes `items` over.
cdef Runs newest(Runs items)
