# cython: cdivision=True
"""The RAM of a guest: a mapping with its initial content.

Owns one mapping and, with backing "memfd", its descriptor. Life cycle: the constructor maps and fills the
memory, which is a writable buffer until `close()` (idempotent) unmaps it. Only `GuestWriters` starts threads.
"""

import fcntl
import os

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from posix.mman cimport (
    MADV_HUGEPAGE, MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE,
    MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
)

from snapengine.guest.pattern cimport HOLE, PAGE_WORDS, Pattern, fill_page, page_class, pattern_of
from snapengine.base.oserror cimport raise_oserror

cdef extern from "Python.h":
    int PyBuffer_FillInfo(Py_buffer *view, object exporter, void *buf, Py_ssize_t len, int readonly,
                          int flags) except -1

cdef extern from * nogil:
    """
    #include <sys/mman.h>
    #ifndef MAP_HUGE_2MB
    #define MAP_HUGE_2MB (21 << 26)
    #endif
    """
    const int MAP_HUGETLB
    const int MAP_HUGE_2MB

cdef uint64_t HUGE_BYTES = 2 << 20


cdef class GuestMemory:
    """RAM of `params.size` bytes with the initial content of `params`.

    Raises
    ------
    OSError
        The memory cannot be mapped. ENOMEM with ``pages="2m"``: raise /proc/sys/vm/nr_hugepages.
    """
    cdef readonly object params
    cdef readonly uint64_t addr
    cdef readonly uint64_t length
    cdef readonly int memfd
    cdef bint initialized                  # False after a wrong argument: `memfd` is 0 and not ours
    cdef Pattern pattern
    cdef void *reserved           # address space; `addr` is its first multiple of 2 MiB
    cdef uint64_t reserved_length
    cdef Py_ssize_t exports

    def __cinit__(self, params not None):
        self.memfd = -1
        self.initialized = True
        self.params = params
        self.pattern = pattern_of(params)
        self.length = params.size

    def __init__(self, params):
        if self.addr:
            raise RuntimeError("this memory is already mapped")
        try:
            self._map()
            self._fill()
        except BaseException:
            self.close()
            raise

    cdef int _map(self) except -1:
        cdef int flags = MAP_FIXED, advice
        cdef bint hugetlb = self.params.pages == "2m"
        cdef void *addr
        if self.params.backing == "memfd":
            self.memfd = sealed_memfd(self.length, hugetlb)
            flags |= MAP_SHARED
        else:
            flags |= MAP_PRIVATE | MAP_ANONYMOUS
        if hugetlb:
            flags |= MAP_HUGETLB | MAP_HUGE_2MB
        # Huge pages need an aligned address; mmap() aligns hugetlb mappings only.
        self.reserved_length = self.length + HUGE_BYTES
        addr = mmap(NULL, self.reserved_length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if addr == MAP_FAILED:
            raise_oserror(errno, "mmap")
        self.reserved = addr
        addr = <void *>((<uintptr_t>addr + HUGE_BYTES - 1) // HUGE_BYTES * HUGE_BYTES)
        if mmap(addr, self.length, PROT_READ | PROT_WRITE, flags, self.memfd, 0) == MAP_FAILED:
            raise_oserror(errno, "mmap (huge pages: see /proc/sys/vm/nr_hugepages)" if hugetlb else "mmap")
        self.addr = <uint64_t>addr
        if not hugetlb:
            advice = MADV_HUGEPAGE if self.params.pages == "thp" else MADV_NOHUGEPAGE
            if madvise(addr, self.length, advice) != 0:
                raise_oserror(errno, "madvise")
        return 0

    cdef int _fill(self) except -1:
        cdef uint64_t page
        cdef uint64_t *words = <uint64_t *>self.addr
        with nogil:
            for page in range(self.pattern.pages):
                if page_class(&self.pattern, page) != HOLE:
                    fill_page(&self.pattern, page, words + page * PAGE_WORDS)
        return 0

    def close(self):
        """Unmap the memory. Raises BufferError while a memoryview or GuestWriters uses it."""
        cdef void *reserved = self.reserved
        if self.exports:
            raise BufferError("the memory is in use")
        self.addr, self.reserved = 0, NULL
        if reserved != NULL and munmap(reserved, self.reserved_length) != 0:
            raise_oserror(errno, "munmap")
        if self.memfd >= 0:
            fd, self.memfd = self.memfd, -1
            os.close(fd)

    def __dealloc__(self):
        if self.reserved != NULL:
            munmap(self.reserved, self.reserved_length)
        if self.initialized and self.memfd >= 0:
            os.close(self.memfd)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        if not self.addr:
            raise ValueError("the memory is closed")
        PyBuffer_FillInfo(buffer, self, <void *>self.addr, self.length, 0, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.exports -= 1


cdef int sealed_memfd(uint64_t length, bint hugetlb) except -1:
    """A memfd with a sealed size: a process that maps it cannot get SIGBUS."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if hugetlb:
        flags |= os.MFD_HUGETLB | os.MFD_HUGE_2MB
    fd = os.memfd_create("snapengine-guest", flags)
    try:
        os.ftruncate(fd, length)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd
