# cython: cdivision=True
"""Floor of arming and releasing: bare UFFDIO_WRITEPROTECT calls. Not shipped (setup_floors.py)."""

from libc.stdint cimport uint64_t

from snapengine.base.oserror cimport raise_oserror
from snapengine.base.pthreads cimport snap_now_ns
from snapengine.kernel.uffd cimport uffd_protect, uffd_unprotect


def write_protect_ns(int fd, uint64_t addr, uint64_t length, uint64_t batch, bint protect):
    """UFFDIO_WRITEPROTECT over the memory, one ioctl per `batch` bytes, with or without MODE_WP."""
    cdef uint64_t at = 0, began, size
    cdef int err = 0
    with nogil:
        began = snap_now_ns()
        while at < length and not err:
            size = min(batch, length - at)
            err = uffd_protect(fd, addr + at, size) if protect else uffd_unprotect(fd, addr + at, size)
            at += size
        began = snap_now_ns() - began
    if err:
        raise_oserror(err, b"UFFDIO_WRITEPROTECT")
    return began
