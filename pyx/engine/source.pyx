"""Reading the target's memory: which pages hold data, and their bytes into a slot.

Runs on capture threads. It reads only pages that were populated at T, since reading a hole fills it: a
process_vm_readv of 64 MiB of memfd hole allocates 64 MiB in the target. Changes of the mapping after T, such
as a discarded page, are detected after the copy (`pyx/engine/recheck`), and the page is recorded as lost.
"""

from libc.errno cimport EFAULT, EINTR, EIO, ENXIO, errno
from libc.string cimport memcpy, memset
from posix.unistd cimport lseek, pread

from snapengine.base.atomics cimport snap_add_one_writer, snap_ctz, snap_fetch_or
from snapengine.base.bitmap cimport bits_fill, bits_mask, bits_run, bits_test
from snapengine.base.nofault cimport guarded
from snapengine.image.format cimport SNAP_DATA, SNAP_HOLE, SNAP_LOST, SNAP_ZERO
from snapengine.engine.memfile cimport page_exists, resident
from snapengine.base.pages cimport copy_page, copy_page_sum, page_nonzero
from snapengine.kernel.pagemap cimport pagemap_read
from snapengine.pipeline.pool cimport lane_entry, lane_slot
from snapengine.kernel.processvm cimport iovec, process_vm_readv
from snapengine.engine.state cimport (
    PRESENCE_ALL, PRESENCE_BITS, PRESENCE_FILE, PRESENCE_SEEK, READ_FILE, READ_MEMORY,
    clear_pages, page_addr,
)
from snapengine.engine.recheck cimport all_still_valid, still_valid, punched

cdef extern from "<unistd.h>" nogil:
    const int SEEK_DATA
    const int SEEK_HOLE

cdef uint64_t PAGE = 4096


cdef void put_pages(capture_t *capture, lane_t *lane, uint64_t page, uint64_t n,
                    unsigned kind) noexcept nogil:
    cdef uint64_t i
    lane_entry(&lane.slot, page, n, kind)
    if kind == SNAP_DATA:
        snap_add_one_writer(&lane.data_pages, n)
    elif kind == SNAP_ZERO:
        snap_add_one_writer(&lane.zero_pages, n)
    elif kind == SNAP_HOLE:
        snap_add_one_writer(&lane.hole_pages, n)
    else:
        snap_add_one_writer(&lane.lost_pages, n)
        for i in range(page, page + n):
            snap_fetch_or(&capture.lost[i >> 6], <uint64_t>1 << (i & 63))
    if capture.data != NULL:        # dirty logging: one thread only
        if kind == SNAP_DATA:
            bits_fill(capture.data, page, n)
        else:
            clear_pages(capture, capture.data, page, n)
        if kind != SNAP_LOST:           # it may have been lost in an earlier round
            clear_pages(capture, capture.lost, page, n)


cdef void _find_extent(lane_t *lane, region_t *region, uint64_t offset) noexcept nogil:
    """Cache the extent of data or hole of the region's file around `offset`, which counts from page
    first_page."""
    cdef long data = lseek(region.file, region.file_offset + offset, SEEK_DATA)
    cdef long edge
    lane.extent_region = region
    lane.extent_start = offset
    if data < 0:
        # ENXIO: no data from here on. On any other error read everything.
        lane.extent_data = errno != ENXIO
        lane.extent_end = region.pages * PAGE
    elif <uint64_t>data > region.file_offset + offset:
        lane.extent_data = False
        lane.extent_end = data - region.file_offset
    else:
        edge = lseek(region.file, region.file_offset + offset, SEEK_HOLE)
        lane.extent_data = True
        lane.extent_end = edge - region.file_offset if edge >= 0 else region.pages * PAGE


cdef uint64_t data_from(region_t *region, uint64_t page) noexcept nogil:
    cdef long data
    if region.presence != PRESENCE_SEEK or not region.sparse:
        return page
    data = lseek(region.file, region.file_offset + (page - region.first_page) * PAGE, SEEK_DATA)
    if data < 0:
        return region.first_page + region.pages if errno == ENXIO else page
    return region.first_page + (data - region.file_offset) // PAGE


cdef uint64_t _mapped(capture_t *capture, region_t *region, uint64_t page, uint64_t mask) noexcept nogil:
    """Pages in the target's page tables: they are data, and need no lookup in the file."""
    cdef uint64_t entries[64]
    cdef uint64_t first = snap_ctz(mask)
    cdef uint64_t result = 0
    cdef uint64_t n = 1
    cdef uint64_t i
    while n < 64 - first and mask >> (first + n):
        n += 1
    if pagemap_read(capture.pagemap, page_addr(region, page + first), entries, n) != 0:
        return 0
    for i in range(n):
        result |= (entries[i] & 1) << (first + i)
    return result & mask


cdef uint64_t _populated_by_seek(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                                 uint64_t mask) noexcept nogil:
    """SEEK_HOLE goes over all pages up to the hole: 10 ms per GiB, during which the CPU does nothing else. So
    the page tables are read first, and a fault thread, for which a writer waits, looks up its pages one by
    one.

    The cached extent remains correct: a page leaves it only when it is claimed, and a claimed page is not
    looked up again."""
    cdef uint64_t result = _mapped(capture, region, page, mask) if mask else 0
    cdef uint64_t first, offset, n
    mask &= ~result
    while mask:
        first = snap_ctz(mask)
        offset = (page + first - region.first_page) * PAGE
        if not lane.walks or lane.serving:
            mask &= mask - 1
            if page_exists(region, page + first):
                result |= <uint64_t>1 << first
            continue
        if lane.extent_region != region or not lane.extent_start <= offset < lane.extent_end:
            _find_extent(lane, region, offset)
        n = min((lane.extent_end - offset + PAGE - 1) // PAGE, 64 - first)
        n = max(n, <uint64_t>1)
        if lane.extent_data:
            result |= bits_mask(first, n) & mask
        mask &= ~bits_mask(first, n)
    return result


cdef uint64_t populated(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                        uint64_t mask) noexcept nogil:
    cdef uint64_t known
    if region.presence != PRESENCE_BITS:
        mask &= ~capture.guards[page >> 6]
    known = capture.present[page >> 6] & mask
    if region.presence == PRESENCE_BITS or region.presence == PRESENCE_FILE or not mask:
        return known
    if region.presence == PRESENCE_ALL:
        return mask
    if capture.data != NULL:        # rounds: pages of an earlier round may have been punched out since
        known = 0
    if region.presence == PRESENCE_SEEK:
        return known | _populated_by_seek(capture, lane, region, page, mask & ~known)
    return known | resident(region, page, mask & ~known)


cdef uint64_t _copy_edge(region_t *region, uint64_t addr, char *dst) noexcept nogil:
    """Copy the page at addr, inside which the region begins or ends. The bytes outside the region are set to
    zero."""
    cdef uint64_t begin = max(addr, region.start)
    cdef uint64_t end = min(addr + PAGE, region.end)
    memset(dst, 0, PAGE)
    memcpy(dst + (begin - addr), region.source + (begin - region.addr), end - begin)
    return page_nonzero(dst)


cdef int _copy_in(lane_slot *slot, const char *src) noexcept nogil:
    """Append one page to the slot, and add it to the slot's checksum if that covers all data before it."""
    cdef int nonzero
    if not slot.computes_crc or slot.crc_bytes != slot.used:
        return copy_page(slot.data + slot.used, src)
    nonzero = copy_page_sum(slot.data + slot.used, src, &slot.crc)
    slot.crc_bytes += PAGE if nonzero else 0
    return nonzero


cdef struct lane_state_t:           # the state of a lane before a copy, to restore it
    lane_slot slot
    uint64_t last_entry
    uint64_t data
    uint64_t zero
    uint64_t hole
    uint64_t lost


cdef lane_state_t _lane_state(lane_t *lane) noexcept nogil:
    cdef lane_state_t state
    state.slot = lane.slot
    state.last_entry = lane.slot.entries[lane.slot.n_entries - 1] if lane.slot.n_entries else 0
    state.data = lane.data_pages
    state.zero = lane.zero_pages
    state.hole = lane.hole_pages
    state.lost = lane.lost_pages
    return state


cdef void _restore_lane(lane_t *lane, const lane_state_t *state) noexcept nogil:
    lane.slot = state.slot
    if state.slot.n_entries:
        lane.slot.entries[state.slot.n_entries - 1] = state.last_entry
    lane.data_pages = state.data
    lane.zero_pages = state.zero
    lane.hole_pages = state.hole
    lane.lost_pages = state.lost


cdef struct loads_t:
    capture_t *capture
    lane_t *lane
    region_t *region
    uint64_t page
    uint64_t n


cdef int _load(void *arg) noexcept nogil:
    cdef loads_t *loads = <loads_t *>arg
    cdef capture_t *capture = loads.capture
    cdef lane_t *lane = loads.lane
    cdef region_t *region = loads.region
    cdef uint64_t i, addr, nonzero
    for i in range(loads.page, loads.page + loads.n):
        addr = page_addr(region, i)
        if addr < region.start or addr + PAGE > region.end:
            nonzero = _copy_edge(region, addr, lane.slot.data + lane.slot.used)
        else:
            nonzero = _copy_in(&lane.slot, region.source + (addr - region.addr))
        if nonzero:
            lane.slot.used += PAGE
            put_pages(capture, lane, i, 1, SNAP_DATA)
        else:
            put_pages(capture, lane, i, 1, SNAP_ZERO)
    return 0


cdef void _record_read_page(capture_t *capture, lane_t *lane, uint64_t page) noexcept nogil:
    """Record the page that was read to the end of the slot's data."""
    if page_nonzero(lane.slot.data + lane.slot.used):
        lane.slot.used += PAGE
        put_pages(capture, lane, page, 1, SNAP_DATA)
    else:
        put_pages(capture, lane, page, 1, SNAP_ZERO)


cdef void _read_by_kernel(capture_t *capture, lane_t *lane, region_t *region, uint64_t page) noexcept nogil:
    """A page of this process where a load may fault. /proc/self/mem also reads pages under PROT_NONE or
    protection keys, and fails with EIO for pages that do not exist."""
    cdef uint64_t addr = page_addr(region, page)
    cdef uint64_t begin = max(addr, region.start)
    cdef uint64_t length = min(addr + PAGE, region.end) - begin
    cdef char *dst = lane.slot.data + lane.slot.used
    memset(dst, 0, PAGE)
    if capture.mem < 0 or pread(capture.mem, dst + (begin - addr), length, <long>begin) != <ssize_t>length:
        put_pages(capture, lane, page, 1, SNAP_LOST)
    else:
        _record_read_page(capture, lane, page)


cdef int _copy_by_loads(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                        uint64_t n) noexcept nogil:
    """The owner of the memory may have unmapped, truncated or protected it meanwhile. Then the run is undone
    and read page by page through the kernel."""
    cdef lane_state_t state = _lane_state(lane)
    cdef uint64_t low = <uint64_t>region.source + (page_addr(region, page) - region.addr)
    cdef loads_t loads
    cdef uint64_t i
    loads.capture = capture
    loads.lane = lane
    loads.region = region
    loads.page = page
    loads.n = n
    if guarded(_load, &loads, low, low + n * PAGE) == 0:
        return 0
    _restore_lane(lane, &state)
    for i in range(page, page + n):
        _read_by_kernel(capture, lane, region, i)
    return 0


cdef ssize_t _fetch(capture_t *capture, region_t *region, uint64_t page, uint64_t n,
                    char *dst) noexcept nogil:
    """The bytes of the run that were read into dst; -errno if none."""
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


cdef void _read_unreadable(capture_t *capture, lane_t *lane, region_t *region, uint64_t page) noexcept nogil:
    """A page that process_vm_readv cannot read: under PROT_NONE, which /proc/PID/mem reads, or not mapped any
    more."""
    cdef char *dst = lane.slot.data + lane.slot.used
    cdef uint64_t offset = region.file_offset + (page - region.first_page) * PAGE
    if region.file >= 0 and offset >= region.file_end:
        put_pages(capture, lane, page, 1, SNAP_HOLE)        # beyond the end of its file: no access at T
    elif capture.mem < 0 or pread(capture.mem, dst, PAGE, <long>page_addr(region, page)) != <ssize_t>PAGE:
        put_pages(capture, lane, page, 1, SNAP_LOST)
    else:
        _record_read_page(capture, lane, page)


cdef int _copy_by_syscalls(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
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
        elif punched(capture, region, page + i):
            put_pages(capture, lane, page + i, 1, SNAP_LOST)
        elif region.reading == READ_FILE and region.presence != PRESENCE_SEEK and capture.data == NULL \
                and not bits_test(capture.present, page + i):
            # No page table entry and only zeros: equivalent to a hole. (In rounds it is recorded as zero.)
            put_pages(capture, lane, page + i, 1, SNAP_HOLE)
        else:
            put_pages(capture, lane, page + i, 1, SNAP_ZERO)
    lane.slot.used += dst - base
    if got < n:
        _read_unreadable(capture, lane, region, page + got)
        if got + 1 < n:
            return _copy_by_syscalls(capture, lane, region, page + got + 1, n - got - 1)
    return 0


cdef int _copy(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t n) noexcept nogil:
    if region.reading == READ_MEMORY:
        return _copy_by_loads(capture, lane, region, page, n)
    return _copy_by_syscalls(capture, lane, region, page, n)


cdef int copy_run(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                  uint64_t n) noexcept nogil:
    cdef lane_state_t state = _lane_state(lane)
    cdef uint64_t i
    cdef int err = _copy(capture, lane, region, page, n)
    if err or still_valid(capture, region, page, n):
        return err
    # Some page does not hold what it held at T: it was discarded, replaced, moved or merged before or during
    # the copy. Undo the run, and copy page by page to keep those that are still valid.
    _restore_lane(lane, &state)
    if n == 1:
        put_pages(capture, lane, page, 1, SNAP_LOST)
        return 0
    for i in range(n):
        err = copy_run(capture, lane, region, page + i, 1)
        if err:
            return err
    return 0


cdef int copy_window(capture_t *capture, lane_t *lane, region_t *region, uint64_t page,
                     uint64_t mask) noexcept nogil:
    cdef lane_state_t state = _lane_state(lane)
    cdef uint64_t rest = mask
    cdef uint64_t first, n
    cdef int err
    while rest:
        n = bits_run(rest, &first)
        err = _copy(capture, lane, region, page + first, n)
        if err:
            return err
        rest &= ~bits_mask(first, n)
    if all_still_valid(capture, region, page, mask):
        return 0
    _restore_lane(lane, &state)
    while mask:
        first = snap_ctz(mask)
        err = copy_run(capture, lane, region, page + first, 1)
        if err:
            return err
        mask &= mask - 1
    return 0
