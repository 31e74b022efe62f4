from libc.stdint cimport uint64_t

from snapengine.kernel.linux cimport page_region

cdef enum:
    SCAN_VECTOR = 512


cdef struct scan_t:
    # One walk over [next, end) of a process's page tables; lives in an arena or on a stack.
    int fd                          # /proc/PID/pagemap
    uint64_t next
    uint64_t end
    uint64_t flags                  # PM_SCAN_*
    uint64_t mask                   # all of these categories
    uint64_t anyof                  # any of these, if not 0
    uint64_t without                # none of these categories
    uint64_t returned               # categories to report
    int err                         # errno of the call that failed, or 0
    const uint64_t *stop            # atomic: ends with ECANCELED once this is not 0; or NULL
    page_region found[SCAN_VECTOR]


# The next batch of regions in `found`; their number, 0 at the end, -1 with scan.err on error.
cdef int scan_step(scan_t *scan) noexcept nogil
# Whether any of the pages in [start, end) was written since it was protected: 1, 0, or -errno.
cdef int scan_written(int fd, uint64_t start, uint64_t end) noexcept nogil
# Which of n ≤ 64 pages from `start` on: bits in `pages`. 0 or errno.
cdef int scan_written_pages(int fd, uint64_t start, uint64_t n, uint64_t *pages) noexcept nogil
# The populated (present or swapped) runs by /proc/PID/pagemap, for kernels without PAGEMAP_SCAN.
# `entries` (n words) gets bit 0 = present, bit 1 = swapped; a guard page is neither. Returns 0 or errno.
cdef int pagemap_read(int fd, uint64_t addr, uint64_t *entries, uint64_t n) noexcept nogil
# PAGE_IS_GUARD if PAGEMAP_SCAN distinguishes guard pages (MADV_GUARD_INSTALL, Linux 6.13) from swapped ones
# (Linux 6.15), else 0.
cdef uint64_t guard_category() except? 1
# Which of n ≤ 64 pages from `start` on are write-protected, a bit each: bit 57 of their entries (Linux 5.14),
# which swapped pages and markers have too. 0 or errno.
cdef int wp_bits(int fd, uint64_t start, uint64_t n, uint64_t *pages) noexcept nogil
