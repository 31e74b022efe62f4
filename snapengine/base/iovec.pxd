# Inline only: no matching .pyx. Advance a vector of buffers after a partial write.
from libc.stddef cimport size_t
from posix.uio cimport iovec


cdef inline int iovec_skip(iovec *parts, int count, size_t done) noexcept nogil:
    """Skip the first `done` bytes, which is at most the sum; return the number of parts used up."""
    cdef int used = 0
    while used < count and done >= parts[used].iov_len:
        done -= parts[used].iov_len
        used += 1
    if done:
        parts[used].iov_base = <char *>parts[used].iov_base + done
        parts[used].iov_len -= done
    return used
