"""Writes to a descriptor without the GIL. Runs on the encoder threads, never on a capture thread.

A thread that blocks in write(2) cannot be cancelled, so writes block for at most 50 ms where possible. A call
to a regular file writes at most 2 MiB. A pipe is written in non-blocking mode if its open file description
has O_NONBLOCK (the sinks open theirs that way). A socket is written with MSG_DONTWAIT. Anything else is
polled first, and a call writes no more than POLLOUT guarantees (PIPE_BUF).
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memset
from libc.time cimport time_t
from posix.fcntl cimport F_GETFL, O_NONBLOCK, fcntl
from posix.stat cimport S_ISBLK, S_ISREG, S_ISSOCK, fstat, struct_stat
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec
from posix.uio cimport writev
from posix.unistd cimport lseek

from snapengine.base.atomics cimport snap_load
from snapengine.base.iovec cimport iovec_skip
from snapengine.base.oserror cimport raise_oserror
from snapengine.base.poll cimport POLLOUT, poll, pollfd

cdef extern from "<fcntl.h>" nogil:
    const unsigned SYNC_FILE_RANGE_WRITE
    int sync_file_range(int fd, long offset, long length, unsigned flags)

cdef extern from "<stdio.h>" nogil:
    const int SEEK_CUR

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    ssize_t sendmsg(int fd, const msghdr *message, int flags)

cdef enum:
    FILE = 0         # blocks only briefly: regular file, block device
    NONBLOCK = 1     # O_NONBLOCK is set: EAGAIN when full
    SOCKET = 2
    POLLED = 3       # may block on more than PIPE_BUF bytes

    POLL_MS = 50     # longest interval between two checks of `cancelled`
    PIPE_BUF = 4096
    WRITE_MAX = 2 << 20
    PARTS_MAX = 4
    WRITEOUT_BYTES = 8 << 20    # written to a file between two calls of sync_file_range


cdef uint64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1_000_000_000 + <uint64_t>now.tv_nsec


cdef void sleep_s(double seconds) noexcept nogil:
    cdef timespec pause
    pause.tv_sec = <time_t>seconds
    pause.tv_nsec = <long>((seconds - <double>pause.tv_sec) * 1e9)
    nanosleep(&pause, NULL)


cdef void wait_writable(int fd) noexcept nogil:
    """Wait up to POLL_MS. Errors are ignored: the next write reports them."""
    cdef pollfd entry
    entry.fd = fd
    entry.events = <short>POLLOUT
    entry.revents = 0
    poll(&entry, 1, POLL_MS)


cdef int writable_now(int fd) noexcept nogil:
    """Wait up to POLL_MS. Returns 1 also for POLLERR and POLLHUP: the next write reports the error."""
    cdef pollfd entry
    entry.fd = fd
    entry.events = <short>POLLOUT
    entry.revents = 0
    return poll(&entry, 1, POLL_MS) > 0


cdef class FdWriter:
    """Writes to descriptor `fd` (-1: discard) at most `rate_limit` bytes per second (0: no limit).

    Raises OSError if `fd` is not an open descriptor.
    """

    def __cinit__(self, int fd, uint64_t rate_limit=0):
        self.fd = fd
        self.rate = <double>rate_limit
        self.tokens = 0.0
        self.refilled_ns = now_ns()
        self.cancelled = NULL
        self.mode = FILE if fd < 0 else self.detect_mode(fd)
        self.writeout_bytes = 0

    @staticmethod
    def detect_mode(int fd):
        """The mode (one of this module's) in which writes to `fd` do not block."""
        cdef struct_stat status
        cdef int flags = fcntl(fd, F_GETFL)
        if flags < 0 or fstat(fd, &status) < 0:
            raise_oserror(errno, b"fstat")
        if S_ISREG(status.st_mode) or S_ISBLK(status.st_mode):
            return FILE
        if S_ISSOCK(status.st_mode):
            return SOCKET
        return NONBLOCK if flags & O_NONBLOCK else POLLED

    cdef int send(self, iovec *parts, int count, uint64_t *sent) noexcept nogil:
        cdef size_t left = 0
        cdef size_t limit
        cdef ssize_t done
        cdef int used
        cdef int i
        for i in range(count):
            left += parts[i].iov_len
        while left:
            limit = self.acquire(left)
            if limit == 0:
                return ECANCELED
            done = self.write_some(parts, count, limit)
            if done < 0:
                return <int>-done
            self.consume(done)
            sent[0] += <uint64_t>done
            left -= <size_t>done
            used = iovec_skip(parts, count, <size_t>done)
            parts += used
            count -= used
        return 0

    cdef size_t acquire(self, size_t wanted) noexcept nogil:
        """A token bucket of 50 ms: the largest burst, and the smallest write of a part."""
        cdef double bucket = self.rate * POLL_MS / 1000.0 + 1.0
        cdef double step = min(<double>wanted, bucket - 1.0 if bucket > 2.0 else 1.0)
        cdef uint64_t now
        while not (self.cancelled != NULL and snap_load(self.cancelled)):
            if self.rate == 0.0:
                return wanted
            now = now_ns()
            self.tokens = min(bucket, self.tokens + <double>(now - self.refilled_ns) * self.rate * 1e-9)
            self.refilled_ns = now
            if self.tokens >= step:
                return min(wanted, <size_t>self.tokens)
            sleep_s(min(POLL_MS / 1000.0, (step - self.tokens) / self.rate))
        return 0

    cdef void consume(self, size_t count) noexcept nogil:
        if self.rate != 0.0:
            self.tokens -= <double>count

    cdef void start_writeout(self, size_t count) noexcept nogil:
        """Start writeback during the capture, so that little is left for the fsync at the end (1 GiB: 0.4 s
        for capture and fsync, instead of 0.6 to 1.0 s). The fsync reports disk errors. A block device is
        handled the same way; on memory files the call has no effect."""
        cdef long end
        self.writeout_bytes += count
        if self.writeout_bytes < WRITEOUT_BYTES:
            return
        end = lseek(self.fd, 0, SEEK_CUR)
        if end >= <long>self.writeout_bytes:
            sync_file_range(self.fd, end - <long>self.writeout_bytes, <long>self.writeout_bytes,
                            SYNC_FILE_RANGE_WRITE)
        self.writeout_bytes = 0

    cdef ssize_t write_some(self, iovec *parts, int count, size_t limit) noexcept nogil:
        cdef iovec some[PARTS_MAX]
        cdef msghdr message
        cdef ssize_t done
        cdef int n = 0
        cdef int i
        if self.fd < 0:
            return <ssize_t>min(limit, parts[0].iov_len)
        if self.mode == POLLED:
            if not writable_now(self.fd):
                return 0
            limit = min(limit, <size_t>PIPE_BUF)
        limit = min(limit, <size_t>WRITE_MAX)
        for i in range(min(count, PARTS_MAX)):
            if limit == 0:
                break
            some[n].iov_base = parts[i].iov_base
            some[n].iov_len = min(parts[i].iov_len, limit)
            limit -= some[n].iov_len
            n += 1
        if self.mode == SOCKET:
            memset(&message, 0, sizeof(message))
            message.msg_iov = some
            message.msg_iovlen = n
            done = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        else:
            done = writev(self.fd, some, n)
        if done >= 0:
            if self.mode == FILE:
                self.start_writeout(<size_t>done)
            return done
        if errno == EINTR:
            return 0
        if errno == EAGAIN:
            wait_writable(self.fd)
            return 0
        return -errno
