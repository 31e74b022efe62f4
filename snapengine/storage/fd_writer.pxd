from libc.stdint cimport uint64_t
from posix.uio cimport iovec

cdef extern from "<errno.h>" nogil:
    const int ECANCELED  # not in libc.errno


cdef class FdWriter:
    # Writes bytes to one descriptor without the GIL. Handles partial writes, EINTR, full pipes and the rate
    # limit. Owns nothing: the sink owns the descriptor and outlives the writer.
    cdef int fd                    # -1: discard
    cdef int mode
    cdef double rate               # bytes a second; 0: no limit
    cdef double tokens             # token bucket: bytes that may be written now
    cdef uint64_t refilled_ns      # time of the last refill of `tokens`
    cdef size_t writeout_bytes     # written to a file since the last sync_file_range
    cdef uint64_t *cancelled       # polled at least every 50 ms (acquire)

    # Writes all of parts[0..count), which it modifies, and adds the bytes written to `sent`.
    # Returns 0, an errno, or ECANCELED.
    cdef int send(self, iovec *parts, int count, uint64_t *sent) noexcept nogil
    # Waits until the rate limit allows some of `wanted` bytes. Returns how many, or 0 if cancelled.
    cdef size_t acquire(self, size_t wanted) noexcept nogil
    # Removes `count` bytes from the token bucket.
    cdef void consume(self, size_t count) noexcept nogil
    # Counts bytes written to a file; starts writeback of them every WRITEOUT_BYTES.
    cdef void start_writeout(self, size_t count) noexcept nogil
    # One write of at most `limit` bytes. Returns the bytes written (0: retry) or -errno.
    cdef ssize_t write_some(self, iovec *parts, int count, size_t limit) noexcept nogil
