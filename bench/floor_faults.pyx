# cython: cdivision=True, boundscheck=False, wraparound=False
"""Floor of a write fault that another thread serves. Not shipped (setup_floors.py)."""

from array import array

from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy
from posix.unistd cimport read

from snapengine.kernel.linux cimport UFFD_EVENT_PAGEFAULT, uffd_msg
from snapengine.base.oserror cimport raise_oserror
from snapengine.base.pthreads cimport snap_now_ns, snap_pin_to
from snapengine.kernel.uffd cimport uffd_unprotect, uffd_unregister

cdef extern from *:
    ctypedef char volatile_char "volatile char"

cdef uint64_t PAGE = 4096


cdef class FaultLoop:
    """The minimal fault handler: read the message, memcpy the page, un-protect it.

    `fd` is a userfaultfd with `length` bytes at `addr` registered and protected. Threads that call `serve`
    are the handlers: they block in read(2), or poll if `fd` has O_NONBLOCK. `run` then writes to one page
    after another. The last pages, one per handler, end the handlers: each returns after serving one of them.
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
        """Handle faults on the cpu-th usable CPU until `run` ends."""
        cdef char[4096] page
        with nogil:
            snap_pin_to(cpu)
            while self._serve_one(page) < self.last:
                pass

    cdef uint64_t _serve_one(self, char *page) noexcept nogil:
        # Returns the served address, 0 if there was no fault, ~0 after an error.
        cdef uffd_msg message
        cdef uint64_t at
        cdef ssize_t got = read(self.fd, &message, sizeof(message))
        if got < 0 and (errno == EINTR or errno == EAGAIN):
            return 0
        if got != sizeof(message) or message.event != UFFD_EVENT_PAGEFAULT:
            self.err = errno if got < 0 else EIO
            uffd_unregister(self.fd, self.addr, self.length)  # otherwise the writer blocks forever
            return ~<uint64_t>0
        at = message.arg.pagefault.address & ~(PAGE - 1)
        memcpy(page, <const void *><uintptr_t>at, PAGE)
        uffd_unprotect(self.fd, at, PAGE)
        return at

    def run(self, int cpu=-1):
        """Write on the cpu-th usable CPU (negative: any); returns an array of nanoseconds per write."""
        cdef uint64_t count = self.length // PAGE - self.handlers
        cdef uint64_t i, began
        cdef uint64_t[::1] taken
        result = array("Q", bytes(8 * count))
        taken = result
        with nogil:
            if cpu >= 0:
                snap_pin_to(cpu)
            for i in range(count):
                began = snap_now_ns()
                (<volatile_char *><uintptr_t>(self.addr + i * PAGE))[0] = 1
                taken[i] = snap_now_ns() - began
            for i in range(count, count + self.handlers):
                (<volatile_char *><uintptr_t>(self.addr + i * PAGE))[0] = 1
        if self.err:
            raise_oserror(self.err, b"userfaultfd")
        return result
