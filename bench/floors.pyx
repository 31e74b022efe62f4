# cython: cdivision=True, boundscheck=False, wraparound=False
"""What the machine can do at best, in as little code as possible: the floors that the bench compares with.

Not shipped: setup_floors.py builds it into build/bench/. Buffers must have been touched before; all
results are nanoseconds of CLOCK_MONOTONIC.
"""

from array import array

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.types cimport pid_t
from posix.unistd cimport read

from snapengine.linux cimport UFFD_EVENT_PAGEFAULT, uffd_msg
from snapengine.oserror cimport raise_oserror
from snapengine.processvm cimport iovec, process_vm_readv
from snapengine.pthreads cimport snap_now_ns, snap_pin_to
from snapengine.uffd cimport uffd_protect, uffd_unprotect, uffd_unregister

cdef uint64_t PAGE = 4096


def address_of(const unsigned char[::1] data not None):
    """Where a buffer lies."""
    return <uintptr_t>&data[0]


def fill(unsigned char[::1] data not None, int value=0x5A):
    """Touch every byte."""
    cdef uint64_t length = data.shape[0]
    with nogil:
        memset(&data[0], value, length)


def copy_ns(unsigned char[::1] dst not None, const unsigned char[::1] src not None):
    """One memcpy() of the whole buffer by this thread."""
    cdef uint64_t length = src.shape[0]
    cdef uint64_t began
    if dst.shape[0] < src.shape[0]:
        raise ValueError("dst is smaller than src")
    with nogil:
        began = snap_now_ns()
        memcpy(&dst[0], &src[0], length)
        began = snap_now_ns() - began
    return began


def vm_read_ns(pid_t pid, uint64_t addr, uint64_t length, unsigned char[::1] dst not None):
    """process_vm_readv() of `length` bytes of another process, each call as much as `dst` holds."""
    cdef iovec local, remote
    cdef uint64_t at = 0, began
    cdef ssize_t got = 0
    local.iov_base = &dst[0]
    with nogil:
        began = snap_now_ns()
        while at < length:
            local.iov_len = min(<uint64_t>dst.shape[0], length - at)
            remote.iov_base = <void *><uintptr_t>(addr + at)
            remote.iov_len = local.iov_len
            got = process_vm_readv(pid, &local, 1, &remote, 1, 0)
            if got <= 0:
                break
            at += got
        began = snap_now_ns() - began
    if got <= 0:
        raise_oserror(errno, b"process_vm_readv")
    return began


def write_protect_ns(int fd, uint64_t addr, uint64_t length, uint64_t piece, bint protect):
    """UFFDIO_WRITEPROTECT over the memory, one ioctl per `piece` bytes, with or without MODE_WP."""
    cdef uint64_t at = 0, began, size
    cdef int err = 0
    with nogil:
        began = snap_now_ns()
        while at < length and not err:
            size = min(piece, length - at)
            err = uffd_protect(fd, addr + at, size) if protect else uffd_unprotect(fd, addr + at, size)
            at += size
        began = snap_now_ns() - began
    if err:
        raise_oserror(err, b"UFFDIO_WRITEPROTECT")
    return began


cdef class FaultLoop:
    """The least that serving a write fault takes: blocking read, memcpy of the page, un-protect it.

    `fd` is a blocking userfaultfd that has `length` bytes at `addr` registered and protected. Threads that
    call `serve` are the handlers; then `run` writes to one page after another. A handler ends when it has
    served one of the last pages, of which there is one for each.
    """
    cdef int fd
    cdef uint64_t addr, length, last
    cdef int handlers, err

    def __init__(self, int fd, uint64_t addr, uint64_t length, int handlers):
        self.fd = fd
        self.addr = addr
        self.length = length
        self.handlers = handlers
        self.last = addr + length - handlers * PAGE

    def serve(self, int cpu):
        """A handler, on the cpu-th usable CPU, until `run` ends it."""
        cdef char[4096] page
        with nogil:
            snap_pin_to(cpu)
            while self._serve_one(page) < self.last:
                pass

    cdef uint64_t _serve_one(self, char *page) noexcept nogil:
        # The address that was served; ~0 after an error.
        cdef uffd_msg message
        cdef uint64_t at
        cdef ssize_t got = read(self.fd, &message, sizeof(message))
        if got < 0 and errno == EINTR:
            return 0
        if got != sizeof(message) or message.event != UFFD_EVENT_PAGEFAULT:
            self.err = errno if got < 0 else 5
            uffd_unregister(self.fd, self.addr, self.length)  # or the writer waits for ever
            return ~<uint64_t>0
        at = message.arg.pagefault.address & ~(PAGE - 1)
        memcpy(page, <const void *><uintptr_t>at, PAGE)
        uffd_unprotect(self.fd, at, PAGE)
        return at

    def run(self):
        """The nanoseconds of each write: an array."""
        cdef uint64_t count = self.length // PAGE - self.handlers
        cdef uint64_t i, began
        cdef uint64_t[::1] taken
        result = array("Q", bytes(8 * count))
        taken = result
        with nogil:
            for i in range(count):
                began = snap_now_ns()
                (<volatile_char *><uintptr_t>(self.addr + i * PAGE))[0] = 1
                taken[i] = snap_now_ns() - began
            for i in range(count, count + self.handlers):
                (<volatile_char *><uintptr_t>(self.addr + i * PAGE))[0] = 1
        if self.err:
            raise_oserror(self.err, b"userfaultfd")
        return result


cdef extern from *:
    ctypedef char volatile_char "volatile char"
