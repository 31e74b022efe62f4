"""Which copies may be believed: what is noted before T, and what is asked after each copy.

A target goes on discarding, replacing and moving its memory. Nothing of that faults before it is done, so
each copy is followed by questions; a page that fails one is lost, never wrong.

| memory | what may have happened | how it is seen |
| --- | --- | --- |
| all | discarded, unmapped, mapped over, merged | it is not protected any more (PAGEMAP_SCAN) |
| private mapping of a memory file | discarded: the file shows through, protected like before | EVENT_REMOVE |
| shared | moved by mremap(), and written to at its new place | EVENT_REMAP |
| memory file | punched or cut: zero pages, protected like before | its time; mappings do not change it |
| hugetlb file | the same, but its time stays | a mapping of it here, the witness, has lost the page |

Runs on capture threads. What is noted is written by the first walker before `armed`; `distrusted` by who
reads an event, with atomic or. Of a REMOVE event the read itself lets the target go on: `reading` counts who
is between that and the bits, and a copy is believed only when nobody is.
"""

from libc.errno cimport ENXIO, errno
from posix.unistd cimport lseek

from snapengine.atomics cimport snap_clz, snap_ctz, snap_fetch_or, snap_load
from snapengine.bitmap cimport bits_clear, bits_fill, bits_mask, bits_next, bits_test
from snapengine.fileio cimport file_mtime
from snapengine.linux cimport MADV_POPULATE_READ, PAGE_IS_PRESENT
from snapengine.pagemap cimport pagemap_read, scan_step, scan_written, scan_written_pages
from snapengine.pthreads cimport snap_sleep_ns
from snapengine.session cimport (
    PRESENCE_FILE, clear_pages, file_changed, next_filled, note_present, page_addr, place_of, region_by_addr,
)

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)

cdef extern from "<unistd.h>" nogil:
    const int SEEK_DATA
    const int SEEK_HOLE

cdef uint64_t PAGE = 4096
cdef uint64_t UNIT = 2 << 20


cdef void _note_data(capture_t *capture, region_t *region) noexcept nogil:
    """Add to `present` what the file holds. What is a hole only at T was punched since the look before:
    it counts as data, and is found lost."""
    cdef uint64_t offset = 0
    cdef uint64_t size = region.pages * PAGE
    cdef long data, edge
    while offset < size and not snap_load(&capture.failed):
        data = lseek(region.file, region.file_offset + offset, SEEK_DATA)
        if data < 0 and errno == ENXIO:
            return
        edge = lseek(region.file, data, SEEK_HOLE) if data >= 0 else -1
        # An answer that tells nothing: all of it counts as data.
        offset = data - region.file_offset if data >= 0 else offset
        if offset >= size:
            return
        data = offset
        offset = min(<uint64_t>edge - region.file_offset, size) if edge >= 0 else size
        note_present(capture, region.first_page + data // PAGE, (offset - data + PAGE - 1) // PAGE)


cdef int _call_witnesses(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
    """Map here what the target has mapped: it is there, so nothing is allocated. (Unless it is punched out
    right now: then a huge page of zeros comes back, as it would by a read of the target's.)"""
    cdef uint64_t start, unit
    cdef uint64_t step = region.unit_pages * PAGE
    cdef int found, i
    lane.scan.fd = capture.pagemap
    lane.scan.next = region.track_start
    lane.scan.end = region.track_end
    lane.scan.flags = 0
    lane.scan.mask = lane.scan.returned = PAGE_IS_PRESENT
    lane.scan.anyof = lane.scan.without = 0
    lane.scan.err = 0
    lane.scan.stop = &capture.failed
    while True:
        found = scan_step(&lane.scan)
        if found <= 0:
            return lane.scan.err
        for i in range(found):
            start = lane.scan.found[i].start & ~(step - 1)
            while start < lane.scan.found[i].end:
                unit = (region.first_page + (start - region.addr) // PAGE) >> 9
                if not bits_test(capture.witnessed, unit) and madvise(
                        region.witness + (start - region.addr), step, MADV_POPULATE_READ) == 0:
                    bits_fill(capture.witnessed, unit, step // UNIT)
                start += step


cdef int _note(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef int i
    cdef int err = 0
    cdef region_t *region
    for i in range(capture.n_regions):
        region = &capture.regions[i]
        if region.presence == PRESENCE_FILE:
            _note_data(capture, region)
        if region.witness != NULL:
            err = err or _call_witnesses(capture, lane, region)
    return err


cdef int note_before(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef int i
    for i in range(capture.n_regions):
        # First of all: whatever is found below cannot have been punched out without a newer time.
        if capture.attached and capture.regions[i].file >= 0:
            capture.regions[i].file_ns = file_mtime(capture.regions[i].file)
    return _note(capture, lane)


cdef bint _witness_gone(capture_t *capture, region_t *region, uint64_t page, uint64_t n) noexcept nogil:
    cdef uint64_t entry, here
    cdef uint64_t at = page
    while at < page + n:
        if bits_test(capture.witnessed, at >> 9):
            here = <uint64_t>region.witness + page_addr(region, at) - region.addr
            if pagemap_read(capture.own_pagemap, here, &entry, 1) or not entry:
                return True
        at = (at | 511) + 1
    return False


cdef void _forget_witnesses(capture_t *capture, region_t *region) noexcept nogil:
    cdef uint64_t page = region.first_page
    while page < region.first_page + region.pages:
        if _witness_gone(capture, region, page, 1):
            bits_clear(capture.witnessed, page >> 9, region.unit_pages >> 9)
        page += region.unit_pages


cdef void note_again(capture_t *capture) noexcept nogil:
    """Two-step: what was punched out before the caller wanted T is a hole of T, not lost."""
    cdef int i
    cdef region_t *region
    for i in range(capture.n_regions):
        region = &capture.regions[i]
        if region.presence == PRESENCE_FILE and file_changed(region):
            region.file_ns = file_mtime(region.file)    # first, as in note_before
            clear_pages(capture, capture.present, region.first_page, region.pages)
            _note_data(capture, region)
        if region.witness != NULL:
            _forget_witnesses(capture, region)


cdef int note_at_t(capture_t *capture, lane_t *lane) noexcept nogil:
    return _note(capture, lane)


cdef bint punched(region_t *region, uint64_t page) noexcept nogil:
    """A write fills the hole again before it faults: then it is data as before, and only the time tells. The
    hole is asked for first: what is filled by then was punched before, and the time is that of the punch."""
    cdef long offset = region.file_offset + (page - region.first_page) * PAGE
    if region.presence != PRESENCE_FILE:
        return False
    return lseek(region.file, offset, SEEK_DATA) != offset or file_changed(region)


cdef bint _still_there(capture_t *capture, region_t *region, uint64_t page, uint64_t n) noexcept nogil:
    return region.witness == NULL or not _witness_gone(capture, region, page, n)


cdef void _await_readers(capture_t *capture, region_t *region) noexcept nogil:
    while region.own and snap_load(&capture.reading):
        snap_sleep_ns(2000)


cdef bint believable(capture_t *capture, region_t *region, uint64_t page, uint64_t n) noexcept nogil:
    cdef uint64_t addr = page_addr(region, page)
    if region.check and scan_written(capture.pagemap, addr, addr + n * PAGE):
        return False
    if not _still_there(capture, region, page, n):
        return False
    if not capture.attached:
        return True
    _await_readers(capture, region)
    return bits_next(capture.distrusted, page, page + n) == page + n


cdef bint all_believable(capture_t *capture, region_t *region, uint64_t page, uint64_t mask) noexcept nogil:
    """Between these pages others may have been saved and released: so which ones, not whether any."""
    cdef uint64_t first = snap_ctz(mask)
    cdef uint64_t n = 64 - snap_clz(mask) - first
    cdef uint64_t written = 0
    if region.check and (scan_written_pages(capture.pagemap, page_addr(region, page + first), n, &written)
                         or written << first & mask):
        return False
    if not _still_there(capture, region, page + first, n):
        return False
    if not capture.attached:
        return True
    _await_readers(capture, region)
    return not snap_load(&capture.distrusted[page >> 6]) & mask


cdef void _distrust_pages(capture_t *capture, uint64_t page, uint64_t last) noexcept nogil:
    cdef uint64_t count
    while page < last:
        count = min(64 - (page & 63), last - page)
        snap_fetch_or(&capture.distrusted[page >> 6], bits_mask(page & 63, count))
        page += count


cdef void distrust(capture_t *capture, uint64_t start, uint64_t length, bint own) noexcept nogil:
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
        if not snap_load(&capture.armed):   # what holds something is not known yet
            _distrust_pages(capture, page, last)
            continue
        while next_filled(capture, &page, last, &run_end):
            _distrust_pages(capture, page, run_end)
            page = run_end
