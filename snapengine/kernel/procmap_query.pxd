from libc.stdint cimport uint64_t


cdef struct vma_t:                  # one mapping of a process
    uint64_t start
    uint64_t end
    uint64_t offset                 # of `start` in its file
    uint64_t flags                  # readable, writable, executable, shared
    uint64_t device
    uint64_t inode                  # 0: anonymous memory


# The mapping that contains `addr`, or else the next one. `maps` is an open /proc/PID/maps. Returns 0, ENOENT
# (there is none), or another errno (ENOTTY: before Linux 6.11).
cdef int next_vma(int maps, uint64_t addr, vma_t *found) noexcept nogil
# Whether the two are adjacent and could be parts of one mapping.
cdef bint same_vma(const vma_t *left, const vma_t *right) noexcept nogil
