"""PAGEMAP_SCAN (Linux 6.7): which pages are populated, huge, or written since they were protected.

It reads the page tables of one process only: a page of a shared file that another process or a write() has
created is not "present" here. Source: Documentation/admin-guide/mm/pagemap.rst.
"""

from libc.errno cimport EAGAIN, EINTR, EIO, errno
from posix.ioctl cimport ioctl

import os
import re

from snapengine.base.atomics cimport snap_load
from snapengine.base.bitmap cimport bits_mask
from snapengine.base.fileio cimport pread_all
from snapengine.kernel.linux cimport (
    ECANCELED,
    IOCTL_PAGEMAP_SCAN, PAGE_IS_FILE, PAGE_IS_GUARD, PAGE_IS_HUGE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED, PAGE_IS_WRITTEN,
    PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, pm_scan_arg,
)

cdef uint64_t CALL_BYTES = <uint64_t>16 << 30     # 43 ms for 4 KiB pages only; then `stop` is checked
cdef uint64_t CALL_ALIGN = 1 << 30                # no call ends inside a huge page

CATEGORIES = {
    "WRITTEN": PAGE_IS_WRITTEN,
    "FILE": PAGE_IS_FILE,
    "PRESENT": PAGE_IS_PRESENT,
    "SWAPPED": PAGE_IS_SWAPPED,
    "PFNZERO": PAGE_IS_PFNZERO,
    "HUGE": PAGE_IS_HUGE,
    "GUARD": PAGE_IS_GUARD,
}
"""Category names (without PAGE_IS_) and their bits."""

WP_MATCHING = PM_SCAN_WP_MATCHING
CHECK_WPASYNC = PM_SCAN_CHECK_WPASYNC

cdef int WP_BIT = 57


cdef int scan_step(scan_t *scan) noexcept nogil:
    cdef pm_scan_arg arg
    cdef long found
    while scan.next < scan.end:
        if scan.stop != NULL and snap_load(scan.stop):
            scan.err = ECANCELED
            return -1
        arg.size = sizeof(pm_scan_arg)
        arg.flags = scan.flags
        arg.start = scan.next
        arg.end = min(scan.end, (scan.next + CALL_BYTES) & ~(CALL_ALIGN - 1))
        arg.walk_end = scan.next
        arg.vec = <uint64_t>&scan.found[0]
        arg.vec_len = SCAN_VECTOR
        arg.max_pages = 0
        arg.category_inverted = scan.without
        arg.category_mask = scan.mask | scan.without
        arg.category_anyof_mask = scan.anyof
        arg.return_mask = scan.returned
        found = ioctl(scan.fd, IOCTL_PAGEMAP_SCAN, &arg)
        if found < 0:
            if errno == EINTR or errno == EAGAIN:
                continue
            scan.err = errno
            return -1
        # A full vector means that there may be more. walk_end can then lie before the end of the last
        # region (the kernel flushes every 512), though that region was walked. Otherwise the walk is
        # complete.
        if found < SCAN_VECTOR:
            scan.next = arg.end
        else:
            scan.next = max(arg.walk_end, scan.found[found - 1].end)
        if found:
            return <int>found
    return 0


cdef long _scan_written(int fd, uint64_t start, uint64_t end, page_region *found, uint64_t length,
                        uint64_t max_pages) noexcept nogil:
    """How many regions were found, or -errno."""
    cdef pm_scan_arg arg
    cdef long n
    arg.size = sizeof(pm_scan_arg)
    arg.flags = 0
    arg.start = start
    arg.end = end
    arg.walk_end = start
    arg.vec = <uint64_t>found
    arg.vec_len = length
    arg.max_pages = max_pages
    arg.category_inverted = 0
    arg.category_mask = PAGE_IS_WRITTEN
    arg.category_anyof_mask = 0
    arg.return_mask = PAGE_IS_WRITTEN
    n = ioctl(fd, IOCTL_PAGEMAP_SCAN, &arg)
    return n if n >= 0 else -errno


cdef int scan_written(int fd, uint64_t start, uint64_t end) noexcept nogil:
    cdef page_region region
    return <int>_scan_written(fd, start, end, &region, 1, 1)


cdef int scan_written_pages(int fd, uint64_t start, uint64_t n, uint64_t *pages) noexcept nogil:
    cdef page_region found[33]      # 64 pages cannot have more separate runs
    cdef uint64_t first, last
    cdef long i
    cdef long regions = _scan_written(fd, start, start + n * 4096, found, 33, 0)
    pages[0] = 0
    for i in range(regions):
        first = (found[i].start - start) // 4096
        last = (found[i].end - start) // 4096
        pages[0] |= bits_mask(first, last - first)
    return 0 if regions >= 0 else <int>-regions


cdef int _read_entries(int fd, uint64_t addr, uint64_t *entries, uint64_t n) noexcept nogil:
    cdef int err = pread_all(fd, entries, n * 8, addr // 4096 * 8)
    return EIO if err < 0 else err


cdef int pagemap_read(int fd, uint64_t addr, uint64_t *entries, uint64_t n) noexcept nogil:
    cdef uint64_t i
    cdef int err = _read_entries(fd, addr, entries, n)
    if err:
        return err
    for i in range(n):
        entries[i] = (entries[i] >> 63 & 1) | <uint64_t>_is_swapped(entries[i]) << 1
    return 0


cdef bint _is_guard(uint64_t entry) noexcept nogil:
    """A guard page of MADV_GUARD_INSTALL: it has no content, and allows no access. Bit 58 marks it since
    Linux 6.15. Before, privileged readers see its marker (swap type 31, offset 4)."""
    cdef bint marker = entry & 31 == 31 and entry >> 5 & 4 != 0
    return entry >> 62 & 1 and (entry >> 58 & 1 or marker)


cdef bint _is_swapped(uint64_t entry) noexcept nogil:
    return entry >> 62 & 1 and not _is_guard(entry)


def is_guard(uint64_t entry):
    """Whether an entry of /proc/PID/pagemap is that of a guard page."""
    return _is_guard(entry)


cdef uint64_t guard_category() except? 1:
    global _guard
    cdef pm_scan_arg arg
    if _guard == <uint64_t>-1:
        _guard = 0
        arg.size = sizeof(pm_scan_arg)
        arg.flags = 0
        arg.start = arg.walk_end = 0
        arg.end = 4096
        arg.vec = arg.vec_len = arg.max_pages = 0
        arg.category_inverted = 0
        arg.category_anyof_mask = arg.return_mask = 0
        arg.category_mask = PAGE_IS_GUARD
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        if ioctl(fd, IOCTL_PAGEMAP_SCAN, &arg) >= 0:
            _guard = PAGE_IS_GUARD
        os.close(fd)
    return _guard


cdef uint64_t _guard = <uint64_t>-1


cdef int wp_bits(int fd, uint64_t start, uint64_t n, uint64_t *pages) noexcept nogil:
    cdef uint64_t entries[64]
    cdef int err = _read_entries(fd, start, entries, n)
    cdef uint64_t i
    pages[0] = 0
    if not err:
        for i in range(n):
            pages[0] |= (entries[i] >> WP_BIT & 1) << i
    return err


def has_wp_bits():
    """Whether /proc/PID/pagemap tells what is write-protected: bit 57 (Linux 5.14,
    Documentation/admin-guide/mm/pagemap.rst).

    Decided by the kernel release: a test page would need a userfaultfd, which this user may lack though the
    target has one.
    """
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(re.match(r"\d*", minor)[0] or 0)) >= (5, 14)


def has_pagemap_scan():
    """Whether this kernel has PAGEMAP_SCAN (Linux 6.7)."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    cdef int status = scan_written(fd, 0, 4096)
    os.close(fd)
    return status >= 0


def scan(int fd, uint64_t start, uint64_t end, *, uint64_t flags=0, uint64_t mask=0, uint64_t anyof=0,
         uint64_t without=0, uint64_t returned=0):
    """All regions of [start, end) that match, as (start, end, categories) tuples.

    ``fd`` is an open /proc/PID/pagemap; the other arguments are category bits (`CATEGORIES`) and flags.
    Raises OSError.
    """
    cdef scan_t walk
    cdef int found, i
    walk.fd = fd
    walk.next = start
    walk.end = end
    walk.flags = flags
    walk.mask = mask
    walk.anyof = anyof
    walk.without = without
    walk.returned = returned or mask | anyof
    walk.err = 0
    walk.stop = NULL
    regions = []
    while True:
        with nogil:
            found = scan_step(&walk)
        if found < 0:
            raise OSError(walk.err, f"PAGEMAP_SCAN: {os.strerror(walk.err)}")
        if found == 0:
            return regions
        for i in range(found):
            region = (walk.found[i].start, walk.found[i].end, walk.found[i].categories)
            if regions and regions[-1][1] == region[0] and regions[-1][2] == region[2]:
                region = (regions.pop()[0], region[1], region[2])
            regions.append(region)


cdef list _runs_by_entries(int fd, uint64_t start, uint64_t end):
    """Before Linux 6.7: eight bytes a page."""
    cdef uint64_t entry, categories
    runs = []
    while start < end:
        data = os.pread(fd, <long>min((end - start) // 4096 * 8, <uint64_t>1 << 20), start // 4096 * 8)
        if not data:
            raise OSError(EIO, "the page table entries cannot be read")
        for entry in memoryview(data).cast("Q"):
            categories = 0
            if entry >> 63:
                categories = PAGE_IS_PRESENT
            elif entry >> 62 & 1 and not _is_guard(entry):
                categories = PAGE_IS_SWAPPED
            if categories:
                categories |= PAGE_IS_FILE if entry >> 61 & 1 else 0
                if runs and runs[-1][1] == start and runs[-1][2] == categories:
                    runs[-1] = (runs[-1][0], start + 4096, categories)
                else:
                    runs.append((start, start + 4096, categories))
            start += 4096
    return runs


def populated_runs(int fd, uint64_t start, uint64_t end, bint use_scan=True):
    """The present and swapped pages of a process as (start, end, categories): PRESENT, SWAPPED, FILE and
    (with PAGEMAP_SCAN) HUGE. Guard pages are not among them.

    ``fd`` is an open /proc/PID/pagemap. Raises OSError.
    """
    cdef uint64_t populated = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    cdef uint64_t guard = guard_category()
    if not use_scan or not has_pagemap_scan():
        return _runs_by_entries(fd, start, end)
    runs = scan(fd, start, end, anyof=populated, without=guard,
                returned=populated | PAGE_IS_FILE | PAGE_IS_HUGE)
    if guard:
        return runs
    found = []
    for run in runs:
        found += [run] if run[2] & PAGE_IS_PRESENT else _runs_by_entries(fd, run[0], run[1])
    return found
