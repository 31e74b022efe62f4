from libc.stdint cimport uint64_t

from snapengine.kernel.linux cimport uffd_msg

cdef enum:
    UFFD_MESSAGES = 64              # what one read takes at most

# read(2) of a userfaultfd, into room for UFFD_MESSAGES: their number, or -errno. -EAGAIN: none is there, or
# another thread took it; also the answer after the end of the process. -EMFILE, -ENFILE: a fork event brings
# a descriptor, and there is no room for it; the event stays until it is read.
cdef int uffd_read(int fd, uffd_msg *messages) noexcept nogil


cdef extern from * nogil:
    """
    #include <linux/userfaultfd.h>
    static inline unsigned long long snap_remap_from(const struct uffd_msg *m) { return m->arg.remap.from; }
    static inline unsigned long long snap_remap_to(const struct uffd_msg *m) { return m->arg.remap.to; }
    static inline unsigned long long snap_remap_len(const struct uffd_msg *m) { return m->arg.remap.len; }
    static inline unsigned long long snap_removed(const struct uffd_msg *m) { return m->arg.remove.start; }
    static inline unsigned long long snap_removed_end(const struct uffd_msg *m) { return m->arg.remove.end; }
    """
    # Members whose names are Python's, or that the kernel's header keeps in a union.
    uint64_t snap_remap_from(const uffd_msg *message)
    uint64_t snap_remap_to(const uffd_msg *message)
    uint64_t snap_remap_len(const uffd_msg *message)
    uint64_t snap_removed(const uffd_msg *message)
    uint64_t snap_removed_end(const uffd_msg *message)
