"""What was populated at T, and what of it is a huge page: from the page tables, before any page is read.

Two scans, since the cheap one alone does not tell enough. PAGEMAP_SCAN for "present or swapped" takes 2.7 ms
per GiB of 4 KiB pages; for nothing but "not protected" it takes 0.3 ms (Linux 6.7: a path of its own). So
where holes are registered for missing faults:

- `scan_before`, after the registration and before anything is protected: `present` and `huge` as they are
  then. From there on a hole can fill only by a fault: it waits for T, or is noted as a hit.
- `scan_at_t`: of those and the hits, what is not protected is no page of T, unless it is populated all the
  same: then another mapping is in its place, it stays in, and its copy is not believed
  (`pyx/engine/recheck`).

Other memory (hugetlb, a peer's descriptor with WP_UNPOPULATED) is scanned at T only.

A guard page (MADV_GUARD_INSTALL) looks swapped, and is neither populated nor accessible: a hole. Of memory
whose file has data behind it, `guards` says so; at T only what had some before is looked at again.

Runs on the walkers, in spans of page numbers that share no word of a bitmap (`pyx/engine/parallel`); the
bitmaps are read by all threads after `armed`, and `huge` as a hint before.
"""

from libc.errno cimport ENXIO, errno
from libc.stdint cimport uint64_t
from posix.unistd cimport lseek

from snapengine.base.atomics cimport snap_load
from snapengine.base.bitmap cimport bits_clear, bits_fill, bits_next
from snapengine.base.fileio cimport file_size
from snapengine.kernel.linux cimport ECANCELED
from snapengine.kernel.procmap_query cimport vma_t
from snapengine.kernel.pagemap cimport pagemap_read, scan_step, scan_t
from snapengine.engine.parallel cimport first_region, span_of
from snapengine.engine.scan_runs cimport (
    begin_scan, clip, run_t, scan_populated, set_present, take_out_unprotected,
)
from snapengine.engine.state cimport (
    PRESENCE_ALL, PRESENCE_BITS, PRESENCE_SEEK, READ_FILE, capture_fail, clear_pages, note_filled,
    note_present, page_addr, page_at, region_t,
)
from snapengine.engine.vma_table cimport vma_at

cdef extern from "<unistd.h>" nogil:
    const int SEEK_DATA

cdef uint64_t PAGE = 4096


cdef bint _by_faults(capture_t *capture, region_t *region) noexcept nogil:
    """Whether no page can come without a fault: the scan before T stands."""
    return capture.has_scan and region.presence == PRESENCE_BITS and region.missing and region.unit_pages == 1


cdef int _scan_by_pagemap(capture_t *capture, lane_t *lane, region_t *region, uint64_t start,
                          uint64_t end) noexcept nogil:
    """Linux before 6.7: eight bytes a page from /proc/PID/pagemap; huge pages are not told."""
    cdef uint64_t *entries = <uint64_t *>&lane.scan.found[0]
    cdef uint64_t i, n
    cdef uint64_t populated_bits = 1 if region.unit_pages > 1 else 3    # a hugetlb marker looks swapped
    cdef int err
    while start < end:
        n = min((end - start) // PAGE, <uint64_t>1024)
        err = pagemap_read(capture.pagemap, start, entries, n)
        if err:
            return err
        for i in range(n):
            if entries[i] & populated_bits:
                note_present(capture, region.first_page + (start - region.addr) // PAGE + i, 1)
        start += n * PAGE
        if snap_load(&capture.failed):
            return ECANCELED
    return 0


cdef int _scan_all_by_pagemap(capture_t *capture, lane_t *lane, region_t *region, bint at_t) noexcept nogil:
    """At T of an attached target: what was populated before, and is mapped no more, stays in; where it has
    mapped a file, all counts as data. Both are found lost."""
    cdef uint64_t addr = region.addr
    cdef uint64_t end = region.addr + region.pages * PAGE
    cdef uint64_t stop
    cdef int err = 0
    cdef vma_t vma
    if not at_t or not capture.attached:
        return _scan_by_pagemap(capture, lane, region, addr, end)
    while addr < end and not err and not vma_at(capture, addr, &vma):
        addr = max(addr, vma.start)
        stop = min(vma.end, end)
        if addr < stop:
            set_present(capture, region, addr, stop, vma.inode != 0)
        if addr < stop and not vma.inode:
            err = _scan_by_pagemap(capture, lane, region, addr, stop)
        addr = max(addr, stop)
    return err


cdef void _add_hits(capture_t *capture, uint64_t first, uint64_t end) noexcept nogil:
    """They may have been holes. No two regions, and no two spans, have bits in one word."""
    cdef uint64_t last = (end + 511) >> 9
    cdef uint64_t unit = bits_next(capture.prearm.dirty_units, first >> 9, last)
    cdef uint64_t word
    while unit < last:
        for word in range(max(first, unit << 9) >> 6, (min(end, (unit + 1) << 9) + 63) >> 6):
            capture.present[word] |= capture.prearm.dirty[word]
        note_filled(capture, unit << 9, 1)
        unit = bits_next(capture.prearm.dirty_units, unit + 1, last)


cdef void _put_back_replaced(capture_t *capture, region_t *region, uint64_t start,
                             uint64_t end) noexcept nogil:
    """Where the target has mapped a file over anonymous memory, what is not populated is no hole of zeros:
    it counts as data, and is found lost."""
    cdef vma_t vma
    while start < end and not vma_at(capture, start, &vma) and vma.start < end:
        if vma.inode and vma.inode != region.zero_inode:
            set_present(capture, region, max(vma.start, start), min(vma.end, end), True)
        start = vma.end


cdef int _scan_at_t(capture_t *capture, lane_t *lane, run_t run, uint64_t start,
                    uint64_t end) noexcept nogil:
    """What of [start, end), addresses, is populated."""
    cdef region_t *region
    cdef uint64_t first, last
    cdef int err, i
    for i in range(run.n):
        region = &run.first[i]
        if capture.prearm.dirty != NULL:
            _add_hits(capture, page_at(region, start), page_at(region, end - PAGE) + 1)
    err = take_out_unprotected(capture, lane, run, start, end)
    for i in range(run.n):
        first = start
        last = end
        # While it stands it replaces nothing.
        if capture.attached and not capture.target_stopped and clip(&run.first[i], &first, &last):
            _put_back_replaced(capture, &run.first[i], first, last)
    return err


cdef int _scan_guards(capture_t *capture, region_t *region, bint at_t) noexcept nogil:
    """Of memory that is not told by its page tables: which pages allow no access, and where its file ends."""
    cdef scan_t scan
    cdef int i, found
    cdef uint64_t start, end
    if at_t and region.file >= 0:
        region.file_end = max(region.file_end, file_size(region.file))
    if not capture.guard or region.unit_pages > 1 or region.presence == PRESENCE_BITS \
            or (at_t and not region.guarded):
        return 0
    if region.guarded:
        bits_clear(capture.guards, region.first_page, region.pages)
    start = region.addr
    end = start + region.pages * PAGE
    begin_scan(capture, &scan, start, end, capture.guard, 0, capture.guard)
    while True:
        found = scan_step(&scan)
        if found <= 0:
            return scan.err
        for i in range(found):
            start = scan.found[i].start
            end = scan.found[i].end
            if clip(region, &start, &end):
                region.guarded = True
                bits_fill(capture.guards, region.first_page + (start - region.addr) // PAGE,
                          (end - start) // PAGE)
    return 0


cdef void _note_units_with_data(capture_t *capture, region_t *region) noexcept nogil:
    """Of a sparse file, which is asked page by page later. What is a hole at T fills by a fault, and that
    does not wait for the walk."""
    cdef uint64_t size = region.pages * PAGE
    cdef uint64_t offset = 0
    cdef uint64_t unit
    cdef long data
    while offset < size and not snap_load(&capture.failed):
        data = lseek(region.file, region.file_offset + offset, SEEK_DATA)
        if data < 0 and errno != ENXIO:     # tells nothing: all of it may hold something
            note_filled(capture, region.first_page, region.pages)
        if data < 0 or data - region.file_offset >= size:
            return
        unit = (region.first_page + (data - region.file_offset) // PAGE) >> 9
        note_filled(capture, unit << 9, 1)
        offset = (((unit + 1) << 9) - region.first_page) * PAGE


cdef int _scan_region(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
    cdef run_t run
    # Of hugetlb files, which have no SEEK_DATA, the page tables tell zero pages from holes.
    if region.presence != PRESENCE_BITS and not (
            region.presence == PRESENCE_ALL and region.reading == READ_FILE):
        return 0
    if capture.has_scan:
        run.first = region
        run.n = 1
        return scan_populated(capture, lane, run, region.track_start, region.track_end)
    return _scan_all_by_pagemap(capture, lane, region, True)


cdef int _scan_span(capture_t *capture, lane_t *lane, region_t *region, uint64_t span,
                    bint at_t) noexcept nogil:
    """Of a region that is not scanned in a run. What cannot be divided is done where it begins."""
    cdef uint64_t first, end
    cdef int err
    cdef run_t run
    if not span_of(capture, region, span, &first, &end):
        return 0
    if first == region.first_page:
        err = _scan_guards(capture, region, at_t)
        if err:
            return err
    if at_t and region.sparse and region.presence == PRESENCE_SEEK and first == region.first_page:
        _note_units_with_data(capture, region)
    if not _by_faults(capture, region) and first != region.first_page:
        return 0
    if not _by_faults(capture, region):
        if capture.has_scan or at_t:
            return _scan_region(capture, lane, region) if at_t else 0
        return _scan_all_by_pagemap(capture, lane, region, False) if region.presence == PRESENCE_BITS else 0
    run.first = region
    run.n = 1
    return _scan_run(capture, lane, run, page_addr(region, first), page_addr(region, end), at_t)


cdef int _scan_run(capture_t *capture, lane_t *lane, run_t run, uint64_t start, uint64_t end,
                   bint at_t) noexcept nogil:
    if at_t:
        return _scan_at_t(capture, lane, run, start, end)
    return scan_populated(capture, lane, run, start, end)


cdef bint _scans_in_run(capture_t *capture, region_t *region, uint64_t span) noexcept nogil:
    cdef uint64_t first, end
    return _by_faults(capture, region) and region.file < 0 and span_of(capture, region, span, &first, &end) \
        and end - first == region.pages


cdef run_t _run_at(capture_t *capture, int number, uint64_t span) noexcept nogil:
    """Regions from that number on that lie whole in a span and can be scanned at once: half the time."""
    cdef run_t run
    run.first = &capture.regions[number]
    run.n = 1
    while _scans_in_run(capture, run.first, span) and number + run.n < capture.n_regions \
            and run.first[run.n].follows and _scans_in_run(capture, run.first + run.n, span):
        run.n += 1
    return run


cdef void _scan_spans(capture_t *capture, lane_t *lane, uint64_t span, bint at_t) noexcept nogil:
    cdef int err
    cdef int i = first_region(capture, span * capture.parallel.span_pages)
    cdef uint64_t end = (span + 1) * capture.parallel.span_pages
    cdef region_t *last
    cdef run_t run
    while i < capture.n_regions and capture.regions[i].first_page < end:
        run = _run_at(capture, i, span)
        if run.n == 1:
            err = _scan_span(capture, lane, run.first, span, at_t)
        else:
            last = run.first + run.n - 1
            err = _scan_run(capture, lane, run, run.first.addr, last.addr + last.pages * PAGE, at_t)
        if err:
            capture_fail(capture, err, "scan of the page tables", run.first.addr)
            return
        i += run.n


cdef void scan_before(capture_t *capture, lane_t *lane, uint64_t span) noexcept nogil:
    _scan_spans(capture, lane, span, False)


cdef void scan_at_t(capture_t *capture, lane_t *lane, uint64_t span) noexcept nogil:
    _scan_spans(capture, lane, span, True)


cdef int scan_anew(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef int i
    cdef int err = 0
    for i in range(capture.n_regions):
        clear_pages(capture, capture.present, capture.regions[i].first_page, capture.regions[i].pages)
        err = err or _scan_guards(capture, &capture.regions[i], False)
        err = err or _scan_region(capture, lane, &capture.regions[i])
    return err
