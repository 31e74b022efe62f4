from libc.stdint cimport uint64_t

# One function per ioctl of userfaultfd(2). Ranges are bytes, aligned to the pages of the mapping.
# Return 0, or the errno value: capture threads call them and cannot raise.
cdef int uffd_api(int fd, uint64_t features) noexcept nogil
cdef int uffd_register(int fd, uint64_t start, uint64_t length, uint64_t mode) noexcept nogil
cdef int uffd_unregister(int fd, uint64_t start, uint64_t length) noexcept nogil
cdef int uffd_protect(int fd, uint64_t start, uint64_t length) noexcept nogil
# The same where a part may have been unmapped (ENOENT, ENOMEM), or mapped over by what cannot be tracked
# (EINVAL, EPERM): that is left out. It is found unprotected after its copy, and lost. What is mapped is asked
# of `maps`, an open /proc/PID/maps of the same process; where that cannot tell (-1; before Linux 6.11),
# halving finds it. They return early once `*stop` is not 0.
cdef int register_mapped(int fd, int maps, const uint64_t *stop, uint64_t start, uint64_t length,
                         uint64_t unit, uint64_t mode) noexcept nogil
cdef int protect_mapped(int fd, int maps, const uint64_t *stop, uint64_t start,
                        uint64_t length) noexcept nogil
cdef int uffd_unprotect(int fd, uint64_t start, uint64_t length) noexcept nogil   # wakes its waiters
cdef int uffd_zeropage(int fd, uint64_t start, uint64_t length) noexcept nogil    # wakes its waiters
cdef int uffd_wake(int fd, uint64_t start, uint64_t length) noexcept nogil


cdef inline uint64_t half_of(uint64_t length, uint64_t unit) noexcept nogil:
    """Where halving cuts `length` > `unit` bytes: a multiple of `unit`, never 0, so that halving ends."""
    return max(length // 2 // unit * unit, unit)


cdef class Uffd:
    # Owns one userfaultfd descriptor. close() releases all that it protects and wakes all waiters.
    cdef readonly int fd
    cdef bint made                        # False: `fd` is 0 and means nothing, as an argument was wrong
    cdef readonly uint64_t features       # as negotiated by UFFDIO_API
