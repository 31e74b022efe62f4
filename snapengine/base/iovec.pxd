# extern-only: no matching .pyx. What is left of a vector of buffers after a write took a part of it.
from libc.stddef cimport size_t
from posix.uio cimport iovec


cdef inline int iovec_skip(iovec *parts, int count, size_t done) noexcept nogil:
    """Take `done` bytes off the front; returns how many parts are used up. `done` is at most their sum."""
    cdef int used = 0
    while used < count and done >= parts[used].iov_len:
        done -= parts[used].iov_len
        used += 1
    if done:
        parts[used].iov_base = <char *>parts[used].iov_base + done
        parts[used].iov_len -= done
    return used
