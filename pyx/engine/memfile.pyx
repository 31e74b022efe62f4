"""Existing pages of shared memory, whichever process has mapped them.

Shared memory is a file. Its existing pages are found by SEEK_DATA and SEEK_HOLE of its descriptor (lseek(2)),
which include swapped pages, or by mincore(2) of a mapping of this process. hugetlb files support neither. No
query allocates a page.

Runs on capture threads. Keeps no state.
"""

from libc.errno cimport ENXIO, errno
from libc.stdint cimport uint64_t
from posix.unistd cimport lseek

from snapengine.base.atomics cimport snap_ctz, snap_load
from snapengine.base.bitmap cimport bits_mask, bits_run
from snapengine.engine.state cimport PRESENCE_MINCORE, note_present, page_addr

cdef extern from "<sys/mman.h>" nogil:
    int mincore(void *addr, size_t length, unsigned char *vec)

cdef extern from "<unistd.h>" nogil:
    const int SEEK_DATA
    const int SEEK_HOLE

cdef uint64_t PAGE = 4096


cdef bint page_exists(region_t *region, uint64_t page) noexcept nogil:
    cdef long offset = region.file_offset + (page - region.first_page) * PAGE
    cdef long data
    if region.presence == PRESENCE_MINCORE:
        return resident(region, page & ~<uint64_t>63, bits_mask(page & 63, 1)) != 0
    data = lseek(region.file, offset, SEEK_DATA)
    return errno != ENXIO if data < 0 else data < offset + <long>PAGE


cdef uint64_t resident(region_t *region, uint64_t page, uint64_t mask) noexcept nogil:
    cdef unsigned char found[64]
    cdef uint64_t first, end
    cdef uint64_t result = 0
    cdef uint64_t i
    if not mask:
        return 0
    first = snap_ctz(mask)
    end = min(page + 64, region.first_page + region.pages) - page
    if mincore(<void *>page_addr(region, page + first), (end - first) * PAGE, found) != 0:
        return mask
    for i in range(first, end):
        result |= <uint64_t>(found[i - first] & 1) << i
    return result & mask


cdef void _add_resident(capture_t *capture, region_t *region) noexcept nogil:
    cdef uint64_t page = region.first_page
    cdef uint64_t end = region.first_page + region.pages
    cdef uint64_t n, mask, first, run
    while page < end and not snap_load(&capture.failed):
        n = min(64 - (page & 63), end - page)
        mask = resident(region, page & ~<uint64_t>63, bits_mask(page & 63, n))
        while mask:
            run = bits_run(mask, &first)
            note_present(capture, (page & ~<uint64_t>63) + first, run)
            mask &= ~bits_mask(first, run)
        page += n


cdef void add_existing(capture_t *capture, region_t *region) noexcept nogil:
    cdef uint64_t offset = 0
    cdef uint64_t size = region.pages * PAGE
    cdef long data, edge
    if region.presence == PRESENCE_MINCORE:
        _add_resident(capture, region)
        return
    while offset < size and not snap_load(&capture.failed):
        data = lseek(region.file, region.file_offset + offset, SEEK_DATA)
        if data < 0 and errno == ENXIO:
            return
        edge = lseek(region.file, data, SEEK_HOLE) if data >= 0 else -1
        # On any other error the rest of the region counts as data.
        offset = data - region.file_offset if data >= 0 else offset
        if offset >= size:
            return
        data = offset
        offset = min(<uint64_t>edge - region.file_offset, size) if edge >= 0 else size
        note_present(capture, region.first_page + data // PAGE, (offset - data + PAGE - 1) // PAGE)
