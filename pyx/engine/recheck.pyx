"""Re-checks: whether a copy holds what the page held at T.

A target goes on discarding, replacing and moving its memory. None of these raises a fault before it is done,
so each copy is followed by checks. A page that fails one is reported as lost, never saved with wrong bytes.

| memory | what may have happened | how it is detected |
| --- | --- | --- |
| all | discarded, unmapped, mapped over, merged | it is not protected any more (PAGEMAP_SCAN) |
| private mapping of a memory file | discarded: the file shows through, protected as before | EVENT_REMOVE |
| shared | moved by mremap(), and written to at its new place | EVENT_REMAP |
| shared memory | punched out or truncated, and touched again | a missing fault, before it is filled |
| shared memory | punched out or truncated, not touched since | SEEK_DATA (or mincore) finds a hole |
| hugetlb file | both; no registration for missing faults | its shadow mapping here has lost the page |

File times are not used: the first write through a mapping after each release changes them (Linux 6.18). A
page that is filled again through the file itself (write, fallocate), or by another process, is a write that
write tracking does not see; a warning says so.

Runs on capture threads. The first walker writes the other state before `armed`. Threads that read an event
write `invalidated` with atomic or. Reading a REMOVE event lets the target continue at once. So
`event_readers` counts the threads that have begun to read and have not set the bits yet, and the re-check of
such a mapping waits until there are none. A missing page is recorded before it is filled: a thread that
copies the zeros that fill it checks afterwards, and finds the page invalidated.
"""

from libc.stdint cimport uint64_t

from snapengine.base.atomics cimport snap_clz, snap_ctz, snap_fetch_or, snap_load
from snapengine.base.bitmap cimport bits_clear, bits_fill, bits_mask, bits_next, bits_test
from snapengine.kernel.linux cimport MADV_POPULATE_READ
from snapengine.kernel.procmap_query cimport vma_t
from snapengine.engine.memfile cimport add_existing, page_exists
from snapengine.kernel.pagemap cimport pagemap_read, scan_written, scan_written_pages, wp_bits
from snapengine.base.pthreads cimport snap_sleep_ns
from snapengine.engine.state cimport (
    CHECK_BITS, CHECK_SCAN, PRESENCE_FILE, PRESENCE_MINCORE, PRESENCE_SEEK, READ_FILE, next_filled,
    note_present, page_addr, page_at, place_of, region_at, region_by_addr,
)
from snapengine.engine.vma_table cimport vma_at

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)

cdef uint64_t PAGE = 4096
cdef uint64_t UNIT = 2 << 20


cdef bint _by_file(region_t *region) noexcept nogil:
    """Whether the pages of shared memory can be looked up without touching them."""
    return region.presence in (PRESENCE_FILE, PRESENCE_SEEK, PRESENCE_MINCORE)


cdef int populate_shadow(capture_t *capture, region_t *region, uint64_t page) noexcept nogil:
    """The target has mapped the page, so nothing is allocated. (Unless the page is punched out at this
    moment: then a huge page of zeros is allocated, as by a read of the target's.)"""
    cdef uint64_t entry
    cdef int err
    if bits_test(capture.recheck.shadowed, page >> 9):
        return 0
    err = pagemap_read(capture.pagemap, page_addr(region, page), &entry, 1)
    if not err and entry & 1 and madvise(region.shadow + (page - region.first_page) * PAGE,
                                         region.unit_pages * PAGE, MADV_POPULATE_READ) == 0:
        bits_fill(capture.recheck.shadowed, page >> 9, region.unit_pages >> 9)
    return err


cdef int _populate_shadows(capture_t *capture, region_t *region) noexcept nogil:
    cdef uint64_t page = region.first_page
    cdef int err = 0
    while page < region.first_page + region.pages and not err:
        err = populate_shadow(capture, region, page)
        page += region.unit_pages
    return err


cdef int note_before(capture_t *capture) noexcept nogil:
    cdef int i
    cdef int err = 0
    for i in range(capture.n_regions):
        if _by_file(&capture.regions[i]) and not capture.prearm.enabled:      # otherwise note_again does it
            add_existing(capture, &capture.regions[i])
        if capture.regions[i].shadow != NULL:
            err = err or _populate_shadows(capture, &capture.regions[i])
    return err


cdef bint _shadow_lost(capture_t *capture, region_t *region, uint64_t page, uint64_t n) noexcept nogil:
    cdef uint64_t entry, here
    cdef uint64_t at = page
    while at < page + n:
        if bits_test(capture.recheck.shadowed, at >> 9):
            here = <uint64_t>region.shadow + page_addr(region, at) - region.addr
            if pagemap_read(capture.recheck.own_pagemap, here, &entry, 1) or not entry:
                return True
        at = (at | 511) + 1
    return False


cdef bint drop_shadow(capture_t *capture, region_t *region, uint64_t page) noexcept nogil:
    """True if the unit at `page` has been punched out since its shadow mapping was populated."""
    if not _shadow_lost(capture, region, page, 1):
        return False
    bits_clear(capture.recheck.shadowed, page >> 9, region.unit_pages >> 9)
    return True


cdef void note_again(capture_t *capture) noexcept nogil:
    """Two-step arming: pages punched out before the caller requested T are holes at T, not lost."""
    cdef int i
    cdef uint64_t page
    cdef region_t *region
    for i in range(capture.n_regions):
        region = &capture.regions[i]
        if _by_file(region):
            add_existing(capture, region)
        page = region.first_page
        while region.shadow != NULL and page < region.first_page + region.pages:
            drop_shadow(capture, region, page)
            page += region.unit_pages


cdef void _invalidate_replaced(capture_t *capture, region_t *region) noexcept nogil:
    """Where the target has mapped something else since the mappings were listed, the file holds other bytes.
    These pages count as data, and are found lost."""
    cdef uint64_t at = region.addr
    cdef uint64_t end = region.addr + region.pages * PAGE
    cdef uint64_t first, last
    cdef vma_t vma
    while at < end and not vma_at(capture, at, &vma) and vma.start < end:
        first = max(vma.start, at)
        last = min(vma.end, end)
        if vma.inode != region.inode or vma.offset - vma.start != region.file_offset - region.addr:
            note_present(capture, region.first_page + (first - region.addr) // PAGE, (last - first) // PAGE)
            invalidate(capture, first, last - first, False)
        at = vma.end


cdef int note_at_t(capture_t *capture) noexcept nogil:
    """A page that is missing now but existed at the previous lookup was punched out in between: it counts as
    data, and is found lost."""
    cdef int i
    cdef int err = 0
    for i in range(capture.n_regions):
        if capture.attached and capture.regions[i].shared and capture.regions[i].reading == READ_FILE:
            _invalidate_replaced(capture, &capture.regions[i])
        if capture.regions[i].presence == PRESENCE_FILE:
            add_existing(capture, &capture.regions[i])
        if capture.regions[i].shadow != NULL:
            err = err or _populate_shadows(capture, &capture.regions[i])
    return err


cdef bint punched(capture_t *capture, region_t *region, uint64_t page) noexcept nogil:
    return _by_file(region) and capture.data == NULL and not page_exists(region, page)


cdef bint is_late(region_t *region, uint64_t page) noexcept nogil:
    """Several threads, also of a child, may wait for the same page. The first answer fills it, or it is
    filled through its file. That may have been before T, though the other threads are answered after T."""
    return _by_file(region) and page_exists(region, page)


cdef void note_missing(capture_t *capture, uint64_t addr) noexcept nogil:
    """If the page existed at T, the target has punched it out since, and touches it again."""
    cdef region_t *region = region_at(capture, addr)
    cdef uint64_t page
    if region == NULL or not _by_file(region) or not snap_load(&capture.armed) or capture.data != NULL:
        return
    page = page_at(region, addr)
    if bits_test(capture.present, page) and not bits_test(capture.saved, page) and not is_late(region, page):
        snap_fetch_or(&capture.recheck.invalidated[page >> 6], <uint64_t>1 << (page & 63))


cdef bint _unprotected(capture_t *capture, uint64_t addr, uint64_t n) noexcept nogil:
    """Whether any of n pages is not protected any more, or the check failed."""
    cdef uint64_t pages = 0
    cdef uint64_t count
    if capture.recheck.check_by == CHECK_SCAN:
        return scan_written(capture.pagemap, addr, addr + n * PAGE) != 0
    while n and capture.recheck.check_by == CHECK_BITS:
        count = min(n, <uint64_t>64)
        if wp_bits(capture.pagemap, addr, count, &pages) or ~pages & bits_mask(0, count):
            return True
        addr += count * PAGE
        n -= count
    return False


cdef bint _unprotected_pages(capture_t *capture, uint64_t addr, uint64_t n, uint64_t mask) noexcept nogil:
    """The same for the pages in `mask`, of n ≤ 64 pages starting at addr."""
    cdef uint64_t pages = 0
    if capture.recheck.check_by == CHECK_SCAN:
        return scan_written_pages(capture.pagemap, addr, n, &pages) != 0 or pages & mask
    if capture.recheck.check_by == CHECK_BITS:
        return wp_bits(capture.pagemap, addr, n, &pages) != 0 or ~pages & mask
    return False


cdef bint _shadow_intact(capture_t *capture, region_t *region, uint64_t page, uint64_t n) noexcept nogil:
    """Rounds of dirty logging do not check this: pages that were punched out are copied again."""
    return region.shadow == NULL or capture.data != NULL or not _shadow_lost(capture, region, page, n)


cdef void _await_event_readers(capture_t *capture, region_t *region) noexcept nogil:
    while region.own and snap_load(&capture.recheck.event_readers):
        snap_sleep_ns(2000)


cdef bint still_valid(capture_t *capture, region_t *region, uint64_t page, uint64_t n) noexcept nogil:
    cdef uint64_t addr = page_addr(region, page)
    if region.check and _unprotected(capture, addr, n):
        return False
    if not _shadow_intact(capture, region, page, n):
        return False
    _await_event_readers(capture, region)
    return bits_next(capture.recheck.invalidated, page, page + n) == page + n


cdef bint all_still_valid(capture_t *capture, region_t *region, uint64_t page, uint64_t mask) noexcept nogil:
    """Pages between these may have been saved and released by other threads, so the check must name the
    pages, not only say whether any is unprotected."""
    cdef uint64_t first = snap_ctz(mask)
    cdef uint64_t n = 64 - snap_clz(mask) - first
    if region.check and _unprotected_pages(capture, page_addr(region, page + first), n, mask >> first):
        return False
    if not _shadow_intact(capture, region, page + first, n):
        return False
    _await_event_readers(capture, region)
    return not snap_load(&capture.recheck.invalidated[page >> 6]) & mask


cdef void _invalidate_pages(capture_t *capture, uint64_t page, uint64_t last) noexcept nogil:
    cdef uint64_t count
    while page < last:
        count = min(64 - (page & 63), last - page)
        snap_fetch_or(&capture.recheck.invalidated[page >> 6], bits_mask(page & 63, count))
        page += count


cdef void invalidate(capture_t *capture, uint64_t start, uint64_t length, bint own) noexcept nogil:
    cdef int place = place_of(capture, start)
    cdef uint64_t page, last
    cdef uint64_t run_end = 0
    cdef region_t *region
    while place < capture.n_regions and region_by_addr(capture, place).track_start < start + length:
        region = region_by_addr(capture, place)
        place += 1
        if own and not region.own:
            continue
        page = region.first_page + (max(start, region.addr) - region.addr) // PAGE
        last = region.first_page + min((start + length - region.addr) // PAGE, region.pages)
        if not snap_load(&capture.armed):   # `filled` is not complete yet
            _invalidate_pages(capture, page, last)
            continue
        while next_filled(capture, &page, last, &run_end):
            _invalidate_pages(capture, page, run_end)
            page = run_end
