"""Bytes into a descriptor, without the GIL. Runs on the encoder threads, never on a capture thread.

A thread that is stuck in write(2) cannot be cancelled, so nothing here blocks for longer than 50 ms
where that can be helped: regular files take at most 2 MiB a call; a pipe is written without
blocking where its description has O_NONBLOCK (the sinks open theirs that way); a socket gets
MSG_DONTWAIT; anything else is polled first and gets no more than POLLOUT vouches for (PIPE_BUF).
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
    FILE = 0         # never blocks for long: regular file, block device
    NONBLOCK = 1     # O_NONBLOCK is set: EAGAIN when full
    SOCKET = 2
    POLLED = 3       # may block on more than PIPE_BUF bytes

    STEP_MS = 50     # longest wait between two looks at `cancelled`
    PIPE_BUF = 4096
    WRITE_MAX = 2 << 20
    PARTS_MAX = 4
    WRITEOUT_BYTES = 8 << 20    # written to a file before the disk is started on them


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
    """Wait up to STEP_MS. The write that follows reports errors; this does not."""
    cdef pollfd entry
    entry.fd = fd
    entry.events = <short>POLLOUT
    entry.revents = 0
    poll(&entry, 1, STEP_MS)


cdef int writable_now(int fd) noexcept nogil:
    """1 also for POLLERR and POLLHUP: the write will then say what is wrong."""
    cdef pollfd entry
    entry.fd = fd
    entry.events = <short>POLLOUT
    entry.revents = 0
    return poll(&entry, 1, STEP_MS) > 0


cdef class Outlet:
    """Descriptor `fd` (-1: discard everything) with at most `rate_limit` bytes a second (0: any).

    `OSError`: `fd` is not an open descriptor.
    """

    def __cinit__(self, int fd, uint64_t rate_limit=0):
        self.fd = fd
        self.rate = <double>rate_limit
        self.tokens = 0.0
        self.refilled_ns = now_ns()
        self.cancelled = NULL
        self.mode = FILE if fd < 0 else self.find_mode(fd)
        self.waiting_bytes = 0

    @staticmethod
    def find_mode(int fd):
        """How to write to `fd` without getting stuck (one of this module's modes)."""
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
            limit = self.allow(left)
            if limit == 0:
                return ECANCELED
            done = self.write_some(parts, count, limit)
            if done < 0:
                return <int>-done
            self.spend(done)
            sent[0] += <uint64_t>done
            left -= <size_t>done
            used = iovec_skip(parts, count, <size_t>done)
            parts += used
            count -= used
        return 0

    cdef size_t allow(self, size_t wanted) noexcept nogil:
        """A token bucket of 50 ms: that long is a burst at most, and a step at least."""
        cdef double bucket = self.rate * STEP_MS / 1000.0 + 1.0
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
            sleep_s(min(STEP_MS / 1000.0, (step - self.tokens) / self.rate))
        return 0

    cdef void spend(self, size_t count) noexcept nogil:
        if self.rate != 0.0:
            self.tokens -= <double>count

    cdef void start_writeout(self, size_t count) noexcept nogil:
        """The disk writes while the capture goes on, so that the fsync at the end finds little left (1 GiB:
        both take 0.4 s, against 0.6 to 1.0). An error of the disk is kept for that fsync; a block device is
        written to likewise, and memory files have no disk."""
        cdef long end
        self.waiting_bytes += count
        if self.waiting_bytes < WRITEOUT_BYTES:
            return
        end = lseek(self.fd, 0, SEEK_CUR)
        if end >= <long>self.waiting_bytes:
            sync_file_range(self.fd, end - <long>self.waiting_bytes, <long>self.waiting_bytes,
                            SYNC_FILE_RANGE_WRITE)
        self.waiting_bytes = 0

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
