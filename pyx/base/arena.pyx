"""Memory for capture threads: a separate mapping, which no capture protects.

A capture thread that faulted on memory of its own capture would wait for itself. The memory that these
threads write (slots, queue, bitmaps, counters) is therefore never allocated by malloc, which may place it on
the same pages as buffers of the program. Pages are zero, and populated on first access or by `touch()`.
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
    """`length` bytes of zeroed memory, aligned to 2 MiB if it is at least that long.

    Raises MemoryError. The mapping lives as long as the object. After a fork the child sees zeros
    (MADV_WIPEONFORK, Linux 4.14): it cannot use a capture of its parent, and the parent's capture threads
    avoid a copy-on-write fault per page. With `keep_on_fork` the child gets a copy.
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
        """Populate the first `length` bytes (None: all), in huge pages if available. A first access costs 11
        µs per page where the hypervisor backs memory lazily, and must not happen while a writer waits."""
        cdef uint64_t wanted = self.length if length is None else min(length, self.length)
        with nogil:
            madvise(self.base, self.length, MADV_HUGEPAGE)
            if madvise(self.base, (wanted + 4095) & ~<uint64_t>4095, MADV_POPULATE_WRITE) != 0:
                memset(self.base, 0, wanted)

    cdef void mark_free(self):
        """Discard the content (madvise(2), MADV_FREE): under memory pressure the kernel reclaims the pages.
        Until then they stay populated for the next user."""
        madvise(self.base, self.length, MADV_FREE)

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.length)


cdef class FileView:
    """A read-only shared mapping of `length` bytes of a file at `offset` (a multiple of 4096).

    Raises OSError. `close` unmaps it.
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
