from libc.stdint cimport uint64_t

# One function per ioctl of userfaultfd(2); see ioctl_userfaultfd(2). Linux 4.3, where nothing else is said.
# Ranges are bytes, aligned to the pages of the mapping. They return 0, or the errno value: capture threads
# call them and cannot raise. Common to all that take a range: EINVAL misaligned; ENOENT not mapped, or not
# registered with this userfaultfd (register, unregister: EINVAL or ENOMEM); ESRCH the process has ended.
cdef int uffd_api(int fd, uint64_t features) noexcept nogil
cdef int uffd_register(int fd, uint64_t start, uint64_t length, uint64_t mode) noexcept nogil
cdef int uffd_unregister(int fd, uint64_t start, uint64_t length) noexcept nogil    # wakes its waiters
cdef int uffd_protect(int fd, uint64_t start, uint64_t length) noexcept nogil       # Linux 5.7
cdef int uffd_unprotect(int fd, uint64_t start, uint64_t length) noexcept nogil     # wakes its waiters
cdef int uffd_wake(int fd, uint64_t start, uint64_t length) noexcept nogil

# These four resolve faults. Each fills pages of [start, start + length), in order, and wakes their waiters
# unless `mode` has the ioctl's MODE_DONTWAKE. They stop at the first page that fails:
#   EEXIST  that page, the first of the range, already exists: another thread was faster, or it was never
#           missing. Nothing was filled and nobody woken: call uffd_wake for a waiter.
#   EAGAIN  either the call ended early, then *done > 0: go on behind these bytes, where the next call tells
#           what is wrong. Or the target is in fork(), mremap(), munmap() or madvise(), whose event nobody has
#           read yet, then *done is 0: read the events, then call again.
# `done` gets the bytes that were filled, also beside an error; it may be NULL.
# COPY: bytes of `source`, in this process; EFAULT: they cannot be read. Missing faults.
# UFFDIO_COPY_MODE_WP (Linux 5.7) leaves the pages write-protected.
cdef int uffd_copy(int fd, uint64_t start, const void *source, uint64_t length, uint64_t mode,
                   uint64_t *done) noexcept nogil
# ZEROPAGE: zeros; EINVAL for hugetlb. Missing faults.
cdef int uffd_zeropage(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil
# CONTINUE: maps the pages that the file has (hugetlb: Linux 5.13, shmem: 5.14); EFAULT: it has none there.
# Minor faults. UFFDIO_CONTINUE_MODE_WP (Linux 6.4) leaves the pages write-protected.
cdef int uffd_continue(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil
# POISON (Linux 6.6): whoever touches the pages gets SIGBUS (BUS_MCEERR_AR), as with memory that is broken.
cdef int uffd_poison(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil

# As uffd_register and uffd_protect, for a range of which parts may have been unmapped (ENOENT, ENOMEM), or
# replaced by a mapping that cannot be tracked (EINVAL, EPERM). Those parts are skipped; after their copy they
# are found unprotected, and reported as lost. `maps` is an open /proc/PID/maps of the process, which tells
# what is mapped (Linux 6.11). Where it cannot, or is -1, the range is halved until the calls succeed. Both
# return early once `*stop` is not 0.
cdef int register_mapped(int fd, int maps, const uint64_t *stop, uint64_t start, uint64_t length,
                         uint64_t unit, uint64_t mode) noexcept nogil
cdef int protect_mapped(int fd, int maps, const uint64_t *stop, uint64_t start,
                        uint64_t length) noexcept nogil


cdef inline uint64_t half_of(uint64_t length, uint64_t unit) noexcept nogil:
    """Where to halve `length` > `unit` bytes: at a multiple of `unit`, never 0, so that halving ends."""
    return max(length // 2 // unit * unit, unit)


cdef class Uffd:
    # Owns one userfaultfd descriptor. close() removes its protection and wakes all waiters.
    cdef readonly int fd
    cdef bint made                        # False: __cinit__ failed, so `fd` is 0 and not ours
    cdef readonly uint64_t features       # as negotiated by UFFDIO_API
