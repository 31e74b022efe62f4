"""One mapping of a process at a time: PROCMAP_QUERY (Linux 6.11).

For capture threads: it holds the target's mmap lock only briefly, allocates nothing, and returns the current
state, whereas a list of all mappings is outdated once it has been read. Source: include/uapi/linux/fs.h.
"""

from libc.errno cimport EINTR, errno
from libc.string cimport memset
from posix.ioctl cimport ioctl

from snapengine.kernel.linux cimport IOCTL_PROCMAP_QUERY, PROCMAP_QUERY_COVERING_OR_NEXT_VMA, procmap_query


cdef int next_vma(int maps, uint64_t addr, vma_t *found) noexcept nogil:
    cdef procmap_query query
    memset(&query, 0, sizeof(query))
    query.size = sizeof(query)
    query.query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA
    query.query_addr = addr
    while ioctl(maps, IOCTL_PROCMAP_QUERY, &query) != 0:
        if errno != EINTR:
            return errno
    found.start = query.vma_start
    found.end = query.vma_end
    found.offset = query.vma_offset
    found.flags = query.vma_flags
    found.device = <uint64_t>query.dev_major << 32 | query.dev_minor
    found.inode = query.inode
    return 0


cdef bint same_vma(const vma_t *left, const vma_t *right) noexcept nogil:
    return left.end == right.start and left.flags == right.flags and left.device == right.device \
        and left.inode == right.inode
