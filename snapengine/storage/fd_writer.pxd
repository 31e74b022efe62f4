from libc.stdint cimport uint64_t
from posix.uio cimport iovec

cdef extern from "<errno.h>" nogil:
    const int ECANCELED  # not in libc.errno


cdef class Outlet:
    # Bytes into one descriptor without the GIL: partial writes, EINTR, full pipes, rate limit.
    # Owns nothing: the sink owns the descriptor and outlives the outlet.
    cdef int fd                    # -1: discard
    cdef int mode
    cdef double rate               # bytes a second; 0: no limit
    cdef double tokens             # bytes that may go out now
    cdef uint64_t refilled_ns      # when `tokens` was last brought up to date
    cdef size_t waiting_bytes      # written to a file since the disk was last started
    cdef uint64_t *cancelled       # looked at at least every 50 ms (acquire)

    # Sends everything in parts[0..count), which it consumes, and adds what went out to `sent`.
    # Returns 0, an errno, or ECANCELED.
    cdef int send(self, iovec *parts, int count, uint64_t *sent) noexcept nogil
    # Waits until some of `wanted` bytes may go out; returns how many, 0 if cancelled.
    cdef size_t allow(self, size_t wanted) noexcept nogil
    # Takes `count` bytes from the rate limit.
    cdef void spend(self, size_t count) noexcept nogil
    # Counts what was written to a file, and starts the disk on it from time to time.
    cdef void start_writeout(self, size_t count) noexcept nogil
    # One write of at most `limit` bytes. Returns bytes written (0: try again) or -errno.
    cdef ssize_t write_some(self, iovec *parts, int count, size_t limit) noexcept nogil
