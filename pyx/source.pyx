"""Reading the target's memory: which pages hold data, and their bytes into a slot.

Runs on capture threads. It reads only pages that were populated at T, since reading a hole creates
it: a process_vm_readv of 64 MiB of memfd hole allocates 64 MiB in the target. What the target did to
a page after T is noticed after the copy (`pyx/trust`), and the page put down as lost.
"""

from libc.errno cimport EFAULT, EINTR, EIO, ENXIO, errno
from libc.string cimport memcpy, memset
from posix.unistd cimport lseek, pread

from snapengine.atomics cimport snap_bump, snap_ctz, snap_fetch_or
from snapengine.bitmap cimport bits_clear, bits_fill, bits_mask, bits_test
from snapengine.image_format cimport SNAP_DATA, SNAP_HOLE, SNAP_LOST, SNAP_ZERO
from snapengine.pages cimport copy_page, page_nonzero
from snapengine.pool cimport lane_entry, lane_slot
from snapengine.processvm cimport iovec, process_vm_readv
from snapengine.session cimport (
    PRESENCE_BITS, PRESENCE_FILE, PRESENCE_MINCORE, PRESENCE_SEEK, READ_FILE, READ_MEMORY,
    page_addr,
)
from snapengine.trust cimport believable, punched

cdef extern from "<sys/mman.h>" nogil:
    int mincore(void *addr, size_t length, unsigned char *vec)

cdef extern from "<unistd.h>" nogil:
    const int SEEK_DATA
    const int SEEK_HOLE

cdef uint64_t PAGE = 4096


cdef void put_pages(capture_t *capture, lane_t *lane, uint64_t page, uint64_t n,
                    unsigned kind) noexcept nogil:
    cdef uint64_t i
    lane_entry(&lane.slot, page, n, kind)
    if kind == SNAP_DATA:
        snap_bump(&lane.data_pages, n)
    elif kind == SNAP_ZERO:
        snap_bump(&lane.zero_pages, n)
    elif kind == SNAP_HOLE:
        snap_bump(&lane.hole_pages, n)
    else:
        snap_bump(&lane.lost_pages, n)
        for i in range(page, page + n):
            snap_fetch_or(&capture.lost[i >> 6], <uint64_t>1 << (i & 63))
    if capture.data != NULL:        # dirty logging: one thread only
        if kind == SNAP_DATA:
            bits_fill(capture.data, page, n)
        else:
            bits_clear(capture.data, page, n)
        if kind != SNAP_LOST:           # in an earlier round it was
            bits_clear(capture.lost, page, n)


cdef void _find_extent(lane_t *lane, region_t *region, uint64_t offset) noexcept nogil:
    """Cache the data or hole extent of the region's file around `offset` (from page first_page)."""
    cdef long data = lseek(region.file, region.file_offset + offset, SEEK_DATA)
    cdef long edge
    lane.extent_region = region
    lane.extent_start = offset
    if data < 0:
        # ENXIO: no data from here on. Any other answer tells nothing: read everything.
        lane.extent_data = errno != ENXIO
        lane.extent_end = region.pages * PAGE
    elif <uint64_t>data > region.file_offset + offset:
        lane.extent_data = False
        lane.extent_end = data - region.file_offset
    else:
        edge = lseek(region.file, region.file_offset + offset, SEEK_HOLE)
        lane.extent_data = True
        lane.extent_end = edge - region.file_offset if edge >= 0 else region.pages * PAGE


cdef uint64_t _by_seek(lane_t *lane, region_t *region, uint64_t page, uint64_t mask) noexcept nogil:
    """The cache stays right: a page leaves it only when it is claimed, and a claimed one is not asked
    for again."""
    cdef uint64_t result = 0
    cdef uint64_t first, offset, n
    while mask:
        first = snap_ctz(mask)
        offset = (page + first - region.first_page) * PAGE
        if lane.extent_region != region or not lane.extent_start <= offset < lane.extent_end:
            _find_extent(lane, region, offset)
        n = min((lane.extent_end - offset + PAGE - 1) // PAGE, 64 - first)
        n = max(n, <uint64_t>1)
        if lane.extent_data:
            result |= bits_mask(first, n) & mask
        mask &= ~bits_mask(first, n)
    return result


cdef uint64_t _by_mincore(region_t *region, uint64_t page, uint64_t mask) noexcept nogil:
    cdef unsigned char resident[64]
    cdef uint64_t first = snap_ctz(mask)
    cdef uint64_t end = min(page + 64, region.first_page + region.pages) - page
    cdef uint64_t result = 0
    cdef uint64_t i
    if mincore(<void *>page_addr(region, page + first), (end - first) * PAGE, resident) != 0:
        return mask
    for i in range(first, end):
        if resident[i - first] & 1:
            result |= <uint64_t>1 << i
    return result & mask


cdef uint64_t populated(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                        uint64_t mask) noexcept nogil:
    if region.presence == PRESENCE_BITS or region.presence == PRESENCE_FILE:
        return capture.present[page >> 6] & mask
    if region.presence == PRESENCE_SEEK:
        return _by_seek(lane, region, page, mask)
    if region.presence == PRESENCE_MINCORE:
        return _by_mincore(region, page, mask)
    return mask


cdef uint64_t _copy_edge(region_t *region, uint64_t addr, char *dst) noexcept nogil:
    """The page at addr, where the region begins or ends inside it: other bytes are zero, not copied."""
    cdef uint64_t begin = max(addr, region.start)
    cdef uint64_t end = min(addr + PAGE, region.end)
    memset(dst, 0, PAGE)
    memcpy(dst + (begin - addr), region.source + (begin - region.addr), end - begin)
    return page_nonzero(dst)


cdef int _from_memory(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                      uint64_t n) noexcept nogil:
    cdef uint64_t i, addr, nonzero
    cdef char *dst
    for i in range(page, page + n):
        addr = page_addr(region, i)
        dst = lane.slot.data + lane.slot.used
        if addr < region.start or addr + PAGE > region.end:
            nonzero = _copy_edge(region, addr, dst)
        else:
            nonzero = copy_page(dst, region.source + (addr - region.addr))
        if nonzero:
            lane.slot.used += PAGE
            put_pages(capture, lane, i, 1, SNAP_DATA)
        else:
            put_pages(capture, lane, i, 1, SNAP_ZERO)
    return 0


cdef ssize_t _fetch(capture_t *capture, region_t *region, uint64_t page, uint64_t n,
                    char *dst) noexcept nogil:
    """Bytes of the run read into dst; -errno if none."""
    cdef iovec local
    cdef iovec remote
    cdef ssize_t got
    while True:
        if region.reading == READ_FILE:
            got = pread(region.file, dst, n * PAGE, region.file_offset + (page - region.first_page) * PAGE)
        else:
            local.iov_base = dst
            local.iov_len = n * PAGE
            remote.iov_base = <void *>page_addr(region, page)
            remote.iov_len = n * PAGE
            got = process_vm_readv(capture.pid, &local, 1, &remote, 1, 0)
        if got >= 0 or errno != EINTR:
            return got if got >= 0 else -errno


cdef void _one_unreadable(capture_t *capture, lane_t *lane, region_t *region, uint64_t page) noexcept nogil:
    """A page that process_vm_readv refuses: PROT_NONE, which /proc/PID/mem reads; or not mapped any more."""
    cdef char *dst = lane.slot.data + lane.slot.used
    if capture.mem < 0 or pread(capture.mem, dst, PAGE, <long>page_addr(region, page)) != <ssize_t>PAGE:
        put_pages(capture, lane, page, 1, SNAP_LOST)
    elif page_nonzero(dst):
        lane.slot.used += PAGE
        put_pages(capture, lane, page, 1, SNAP_DATA)
    else:
        put_pages(capture, lane, page, 1, SNAP_ZERO)


cdef int _from_elsewhere(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                         uint64_t n) noexcept nogil:
    cdef char *base = lane.slot.data + lane.slot.used
    cdef char *dst = base
    cdef uint64_t i, got
    cdef ssize_t status
    status = _fetch(capture, region, page, n, base)
    if status < 0 and status != -EFAULT and status != -EIO:
        return <int>-status
    got = <uint64_t>status // PAGE if status > 0 else 0
    for i in range(got):
        if page_nonzero(base + i * PAGE):
            if dst != base + i * PAGE:
                memcpy(dst, base + i * PAGE, PAGE)
            dst += PAGE
            put_pages(capture, lane, page + i, 1, SNAP_DATA)
        elif punched(region, page + i):
            put_pages(capture, lane, page + i, 1, SNAP_LOST)
        elif region.reading == READ_FILE and region.presence != PRESENCE_SEEK and capture.data == NULL \
                and not bits_test(capture.present, page + i):
            # No page table entry and nothing but zeros: as good as a hole (rounds cannot tell: zero there).
            put_pages(capture, lane, page + i, 1, SNAP_HOLE)
        else:
            put_pages(capture, lane, page + i, 1, SNAP_ZERO)
    lane.slot.used += dst - base
    if got < n:
        _one_unreadable(capture, lane, region, page + got)
        if got + 1 < n:
            return _from_elsewhere(capture, lane, region, page + got + 1, n - got - 1)
    return 0


cdef int _copy(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t n) noexcept nogil:
    if region.reading == READ_MEMORY:
        return _from_memory(capture, lane, region, page, n)
    return _from_elsewhere(capture, lane, region, page, n)


cdef int copy_run(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                  uint64_t n) noexcept nogil:
    cdef lane_slot before = lane.slot
    cdef uint64_t last_entry = lane.slot.entries[lane.slot.n_entries - 1] if lane.slot.n_entries else 0
    cdef uint64_t data = lane.data_pages
    cdef uint64_t zero = lane.zero_pages
    cdef uint64_t lost = lane.lost_pages
    cdef uint64_t i
    cdef int err = _copy(capture, lane, region, page, n)
    if err or believable(capture, region, page, n):
        return err
    # Some page is not what it was at T: it was discarded, replaced, moved or merged before or while it was
    # copied. Take the run back; keep the pages that are still good.
    lane.slot = before
    if before.n_entries:
        lane.slot.entries[before.n_entries - 1] = last_entry
    lane.data_pages = data
    lane.zero_pages = zero
    lane.lost_pages = lost
    if n == 1:
        put_pages(capture, lane, page, 1, SNAP_LOST)
        return 0
    for i in range(n):
        err = copy_run(capture, lane, region, page + i, 1)
        if err:
            return err
    return 0
