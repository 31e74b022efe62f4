from libc.stdint cimport uint64_t


cdef class Mapping:                 # one line of /proc/PID/maps; nothing in it changes
    cdef readonly uint64_t start
    cdef readonly uint64_t end
    cdef readonly str perms
    cdef readonly uint64_t offset
    cdef readonly str device
    cdef readonly uint64_t inode
    cdef readonly str path


cdef struct maps_line_t:            # one line, without its line feed; the pointers lead into the text
    uint64_t start
    uint64_t end
    uint64_t offset
    const char *perms               # four letters
    const char *file                # device, inode and path, up to `line_end`
    const char *line_end


cdef struct maps_file_t:            # the second half of a line
    uint64_t device                 # major << 32 | minor, as in vma_t
    uint64_t inode
    const char *device_end          # its text begins at `file`
    const char *path                # up to `line_end`; empty for plain anonymous memory


# The only parser of these lines, in two halves: neighbours often have the same file, which `Mapping` then
# does not parse again. No allocation and no GIL, so capture threads use it too. False: the line is cut.
cdef bint parse_range(const char *at, const char *line_end, maps_line_t *line) noexcept nogil
cdef bint parse_file(const maps_line_t *line, maps_file_t *found) noexcept nogil
