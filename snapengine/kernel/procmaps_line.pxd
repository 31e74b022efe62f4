from libc.stdint cimport uint64_t


cdef class Mapping:                 # one line of /proc/PID/maps; nothing in it changes
    cdef readonly uint64_t start
    cdef readonly uint64_t end
    cdef readonly str perms
    cdef readonly uint64_t offset
    cdef readonly str device
    cdef readonly uint64_t inode
    cdef readonly str path


# Digits up to any other character, which is passed over, too. For capture threads as well.
cdef uint64_t take_number(const char **at, const char *end, uint64_t base) noexcept nogil
