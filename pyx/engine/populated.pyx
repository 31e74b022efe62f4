"""Populated pages and huge pages at T, found by scans of the page tables before any page is read.

There are two scans, since the fast one alone does not find enough. A PAGEMAP_SCAN for "present or swapped"
takes 2.7 ms per GiB of 4 KiB pages; a scan for "not protected" alone takes 0.3 ms (Linux 6.7: a separate
path). So if holes are registered for missing faults:

- `scan_before`, after the registration and before any protection: sets `present` and `huge` as they are then.
  From there on a hole can fill only through a fault, which waits for T or is recorded as dirty.
- `scan_at_t`: of those pages and the dirty pages, a page that is not protected was not populated at T, unless
  it is populated all the same. Then another mapping has taken its place: the page stays in `present`, and the
  re-check finds its copy invalid (`pyx/engine/recheck`).

Other memory (hugetlb, a peer's descriptor with WP_UNPOPULATED) is scanned at T only.

A guard page (MADV_GUARD_INSTALL) looks swapped, but is neither populated nor accessible: it is a hole.
`guards` marks the guard pages of memory whose file has data behind them. At T only regions that had some
before are scanned again.

Runs on the walkers, in spans of page numbers that share no word of a bitmap (`pyx/engine/parallel`). The
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
    begin_scan, clip, run_t, scan_populated, set_present, remove_unprotected,
)
from snapengine.engine.state cimport (
    PRESENCE_ALL, PRESENCE_BITS, PRESENCE_SEEK, READ_FILE, capture_fail, clear_pages, note_filled,
    note_present, page_addr, page_at, region_t,
)
from snapengine.engine.vma_table cimport vma_at

cdef extern from "<unistd.h>" nogil:
    const int SEEK_DATA

cdef uint64_t PAGE = 4096


cdef bint _fills_by_faults(capture_t *capture, region_t *region) noexcept nogil:
    """Whether pages can appear only through faults, so that the scan before T remains valid."""
    return capture.has_scan and region.presence == PRESENCE_BITS and region.missing and region.unit_pages == 1


cdef int _scan_by_pagemap(capture_t *capture, lane_t *lane, region_t *region, uint64_t start,
                          uint64_t end) noexcept nogil:
    """Before Linux 6.7: /proc/PID/pagemap, eight bytes a page. It does not show huge pages."""
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
    """At T of an attached target, pages that were populated before and are not mapped any more stay in
    `present`. Where the target has mapped a file, all pages count as data. The re-check finds both lost."""
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


cdef void _add_dirty(capture_t *capture, uint64_t first, uint64_t end) noexcept nogil:
    """Dirty pages may have been holes before. No two regions, and no two spans, have bits in the same
    word."""
    cdef uint64_t last = (end + 511) >> 9
    cdef uint64_t unit = bits_next(capture.prearm.dirty_units, first >> 9, last)
    cdef uint64_t word
    while unit < last:
        for word in range(max(first, unit << 9) >> 6, (min(end, (unit + 1) << 9) + 63) >> 6):
            capture.present[word] |= capture.prearm.dirty[word]
        note_filled(capture, unit << 9, 1)
        unit = bits_next(capture.prearm.dirty_units, unit + 1, last)


cdef void _set_replaced_present(capture_t *capture, region_t *region, uint64_t start,
                                uint64_t end) noexcept nogil:
    """Where the target has mapped a file over anonymous memory, a page that is not populated is not a hole of
    zeros. It counts as data, and the re-check finds it lost."""
    cdef vma_t vma
    while start < end and not vma_at(capture, start, &vma) and vma.start < end:
        if vma.inode and vma.inode != region.zero_inode:
            set_present(capture, region, max(vma.start, start), min(vma.end, end), True)
        start = vma.end


cdef int _scan_at_t(capture_t *capture, lane_t *lane, run_t run, uint64_t start,
                    uint64_t end) noexcept nogil:
    """Find the populated pages of the address range [start, end)."""
    cdef region_t *region
    cdef uint64_t first, last
    cdef int err, i
    for i in range(run.n):
        region = &run.first[i]
        if capture.prearm.dirty != NULL:
            _add_dirty(capture, page_at(region, start), page_at(region, end - PAGE) + 1)
    err = remove_unprotected(capture, lane, run, start, end)
    for i in range(run.n):
        first = start
        last = end
        # A stopped target replaces no mapping.
        if capture.attached and not capture.target_stopped and clip(&run.first[i], &first, &last):
            _set_replaced_present(capture, &run.first[i], first, last)
    return err


cdef int _scan_guards(capture_t *capture, region_t *region, bint at_t) noexcept nogil:
    """For memory whose pages are not found by its page tables: find its guard pages, which allow no access,
    and the end of its file."""
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
    """For a sparse file, whose pages are looked up when they are copied. A hole of T fills through a fault,
    which is served without the walk."""
    cdef uint64_t size = region.pages * PAGE
    cdef uint64_t offset = 0
    cdef uint64_t unit
    cdef long data
    while offset < size and not snap_load(&capture.failed):
        data = lseek(region.file, region.file_offset + offset, SEEK_DATA)
        if data < 0 and errno != ENXIO:     # unknown: all of it may hold something
            note_filled(capture, region.first_page, region.pages)
        if data < 0 or data - region.file_offset >= size:
            return
        unit = (region.first_page + (data - region.file_offset) // PAGE) >> 9
        note_filled(capture, unit << 9, 1)
        offset = (((unit + 1) << 9) - region.first_page) * PAGE


cdef int _scan_region(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
    cdef run_t run
    # hugetlb files have no SEEK_DATA: there the page tables distinguish zero pages from holes.
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
    """A region that is not scanned in a run. Scans that cannot be divided are done in the span where the
    region begins."""
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
    if not _fills_by_faults(capture, region) and first != region.first_page:
        return 0
    if not _fills_by_faults(capture, region):
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
    return _fills_by_faults(capture, region) and region.file < 0 \
        and span_of(capture, region, span, &first, &end) and end - first == region.pages


cdef run_t _run_at(capture_t *capture, int number, uint64_t span) noexcept nogil:
    """The regions from `number` on that lie completely in a span and can be scanned by one call: half the
    time."""
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


cdef int rescan_all(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef int i
    cdef int err = 0
    for i in range(capture.n_regions):
        clear_pages(capture, capture.present, capture.regions[i].first_page, capture.regions[i].pages)
        err = err or _scan_guards(capture, &capture.regions[i], False)
        err = err or _scan_region(capture, lane, &capture.regions[i])
    return err
