# cython: cdivision=True
"""A loop with the structure of QEMU's background-snapshot: one thread, one page per ioctl and per write.

Before each page it polls the userfaultfd. If there is a fault, its page is next, otherwise the next page of
the scan. Each page is copied, un-protected and written in this order, so a writer does not wait for the sink.
Own code for comparison; not shipped (setup_floors.py).
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free

from pagewise cimport PAGE, copy_page, next_fault, write_page
from snapengine.base.oserror cimport raise_oserror
from snapengine.kernel.uffd cimport uffd_unprotect

cdef struct Scan:
    int uffd
    int sink
    uint64_t addr
    uint64_t next               # the next page of the scan
    uint64_t faults
    uint8_t *saved              # one byte per page
    char[4096] copy


cdef int save_page(Scan *s, uint64_t page) noexcept nogil:
    cdef int err
    copy_page(s.copy, s.addr, page)
    err = uffd_unprotect(s.uffd, s.addr + page * PAGE, PAGE)
    if err:
        return err
    s.saved[page] = 1
    return write_page(s.sink, s.copy, page)


cdef uint64_t choose(Scan *s) noexcept nogil:
    cdef int64_t fault = next_fault(s.uffd, s.addr)
    # A writer that was released but has not run yet leaves its message in the queue.
    if fault >= 0 and not s.saved[fault]:
        s.faults += 1
        return fault
    while s.saved[s.next]:
        s.next += 1
    return s.next


cdef int save_all(Scan *s, uint64_t pages) noexcept nogil:
    cdef uint64_t _done
    cdef int err
    for _done in range(pages):
        err = save_page(s, choose(s))
        if err:
            return err
    return 0


def save(int uffd, int sink, uint64_t addr, uint64_t length):
    """Write the protected memory into `sink`, each page at its offset; returns the number of served faults.

    `sink`: a descriptor; negative: pages are only copied. `uffd`: non-blocking, with the memory registered
    and protected. Raises OSError; then closing `uffd` un-protects the rest.
    """
    cdef Scan s
    cdef int err
    s.uffd, s.sink, s.addr, s.next, s.faults = uffd, sink, addr, 0, 0
    s.saved = <uint8_t *>calloc(length // PAGE, 1)
    if s.saved == NULL:
        raise MemoryError
    with nogil:
        err = save_all(&s, length // PAGE)
    free(s.saved)
    if err:
        raise_oserror(err, b"qemu-shape")
    return s.faults
