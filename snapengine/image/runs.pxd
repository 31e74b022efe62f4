from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t


cdef struct run_t:
    uint64_t page        # image page number
    uint64_t pages
    uint32_t chunk       # index of the chunk, in file order
    uint32_t entry       # index in its page map
    uint32_t data_page   # DATA: index of the first page in the chunk's payload
    uint32_t kind        # SNAP_DATA ... SNAP_LOST


cdef class Runs:
    # The state of a range of pages: ascending, without overlap. The last record of a page wins.
    cdef run_t *runs
    cdef size_t count
    cdef size_t capacity
    cdef int append(self, const run_t *run) noexcept nogil   # 0, or -1: out of memory


# The newest run of each page of `items`, ascending. Consumes `items`.
cdef Runs newest(Runs items)
