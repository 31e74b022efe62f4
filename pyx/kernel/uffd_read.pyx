"""Messages of a userfaultfd: userfaultfd(2), "Reading from the userfaultfd structure"."""

from libc.errno cimport EINTR, errno
from posix.unistd cimport read


cdef int uffd_read(int fd, uffd_msg *messages) noexcept nogil:
    cdef ssize_t got
    while True:
        got = read(fd, messages, UFFD_MESSAGES * sizeof(uffd_msg))
        if got >= 0:
            return <int>(got // <ssize_t>sizeof(uffd_msg))
        if errno != EINTR:
            return -errno
