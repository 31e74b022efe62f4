"""Memory that capture threads may write: its own mapping, which no capture ever protects.

A capture thread that faulted on memory of its own capture would wait for itself; so what these
threads write (slots, queue, bitmaps, counters) never comes from malloc, which shares its pages with
the program's buffers. Pages are zero and appear on first touch unless `touch()` made them.
"""

from libc.errno cimport errno
from libc.stdint cimport uintptr_t
from libc.string cimport memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap,
)

from snapengine.base.oserror cimport raise_oserror

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)
    const int MADV_FREE
    const int MADV_HUGEPAGE
    const int MADV_WIPEONFORK

cdef extern from "snapengine/internal/linux_compat.h" nogil:
    const int MADV_POPULATE_WRITE

cdef uint64_t HUGE = 2 << 20


cdef class Arena:
    """`length` bytes of zeroed memory, aligned to 2 MiB where it is that long.

    Raises MemoryError. The mapping lives as long as the object. After a fork the child sees zeros
    (MADV_WIPEONFORK, Linux 4.14): the child cannot use a capture of its parent, and the parent's
    capture threads must not pay a copy for each page of it. `keep_on_fork` gives the child a copy.
    """

    def __cinit__(self, uint64_t length, bint keep_on_fork=False):
        cdef uint64_t slack = HUGE if length >= HUGE else 0
        cdef uint64_t rounded = (length + 4095) & ~<uint64_t>4095
        cdef char *start
        cdef char *aligned
        if not 0 < length < <uint64_t>1 << 46:
            raise MemoryError(f"{length} bytes")
        start = <char *>mmap(NULL, rounded + slack, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if start == <char *>MAP_FAILED:
            raise MemoryError(f"mmap of {length} bytes: errno {errno}")
        aligned = start
        if slack:
            aligned = <char *>((<uintptr_t>start + HUGE - 1) & ~<uintptr_t>(HUGE - 1))
            if aligned > start:
                munmap(start, aligned - start)
            if aligned < start + slack:
                munmap(aligned + rounded, start + slack - aligned)
        if not keep_on_fork:
            madvise(aligned, rounded, MADV_WIPEONFORK)
        self.base = aligned
        self.length = rounded

    def touch(self, length=None):
        """Make the first `length` bytes (None: all) present, in huge pages where the kernel has them: a first
        touch costs 11 µs a page where the hypervisor backs memory lazily, and must not happen while a
        writer waits."""
        cdef uint64_t wanted = self.length if length is None else min(length, self.length)
        with nogil:
            madvise(self.base, self.length, MADV_HUGEPAGE)
            if madvise(self.base, (wanted + 4095) & ~<uint64_t>4095, MADV_POPULATE_WRITE) != 0:
                memset(self.base, 0, wanted)

    cdef void lend(self):
        """The content is not needed any more: the kernel may take the pages back when it runs short
        (madvise(2), MADV_FREE). Until then a next user finds them present."""
        madvise(self.base, self.length, MADV_FREE)

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.length)


cdef class FileView:
    """A read-only shared mapping of `length` bytes of a file from `offset` (a multiple of 4096).

    Raises OSError. `close` unmaps it; idempotent.
    """

    def __init__(self, int fd, uint64_t offset, uint64_t length):
        cdef void *base
        if self.addr:
            raise ValueError("already mapped")
        base = mmap(NULL, length, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, offset)
        if base == MAP_FAILED:
            raise_oserror(errno, b"mmap")
        self.addr = <uintptr_t>base
        self.length = length

    def close(self):
        """Unmap. Idempotent."""
        if self.addr:
            munmap(<void *><uintptr_t>self.addr, self.length)
            self.addr = 0

    def __dealloc__(self):
        if self.addr:
            munmap(<void *><uintptr_t>self.addr, self.length)
