from libc.stdint cimport uint32_t, uint64_t


cdef struct spill_place:            # of one slot in the spill file
    uint64_t offset
    uint64_t bytes                  # all of the place
    uint64_t entries_at             # where in it the page map begins, behind the data
    uint64_t data_bytes
    uint32_t n_entries


# Write a slot to its place. 0 or errno.
cdef int spill_put(int fd, const spill_place *place, const char *data, const uint64_t *entries) noexcept nogil
# Read it back, and free its place in the file. 0 or errno.
cdef int spill_take(int fd, const spill_place *place, char *data, uint64_t *entries) noexcept nogil
