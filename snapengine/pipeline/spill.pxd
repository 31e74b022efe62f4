from libc.stdint cimport uint32_t, uint64_t


cdef struct spill_extent:           # one slot in the spill file
    uint64_t offset
    uint64_t bytes                  # length of the extent
    uint64_t entries_offset         # of the page map, from the start of the extent
    uint64_t data_bytes
    uint32_t n_entries


# Write a slot to its extent. Returns 0 or an errno.
cdef int spill_write(int fd, const spill_extent *at, const char *data, const uint64_t *entries) noexcept nogil
# Read the slot back and free its space in the file. Returns 0 or an errno.
cdef int spill_read(int fd, const spill_extent *at, char *data, uint64_t *entries) noexcept nogil
