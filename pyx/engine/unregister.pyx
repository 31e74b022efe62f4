"""Unregistering all memory that a userfaultfd protects, in pieces.

Each UFFDIO_UNREGISTER blocks the target's page faults while it runs: 28 ms per GiB of 4 KiB pages. So a
peer's memory is unregistered in pieces of half a millisecond. In an attached process a piece that ends inside
a mapping would split it for a moment, and an mremap() across the edge would fail. There a piece is a whole
mapping, up to 1 GiB, including what it has grown by.

Runs on the first walker, at the end. Also runs on a thread that reads the fork event of one child too many.
"""

from libc.errno cimport EINVAL, ENOENT
from libc.stdint cimport uint64_t

from snapengine.base.atomics cimport snap_load
from snapengine.base.bitmap cimport bits_next
from snapengine.kernel.procmap_query cimport next_vma, same_vma, vma_t
from snapengine.engine.state cimport page_addr, place_of, region_by_addr, region_t
from snapengine.kernel.uffd cimport half_of, uffd_unregister

cdef uint64_t PAGE = 4096
cdef uint64_t UNIT = 2 << 20
cdef uint64_t PIECE = 16 << 20      # bytes: half a millisecond with 4 KiB pages
cdef uint64_t WHOLE_MAX = 1 << 30   # bytes: 28 ms
cdef uint64_t UNKNOWN_MAX = 1 << 30     # bytes, before T: how many of them hold something is not known yet


cdef void _unregister_halves(int fd, uint64_t start, uint64_t length, uint64_t unit) noexcept nogil:
    cdef uint64_t half
    if uffd_unregister(fd, start, length) != EINVAL or length <= unit:
        return
    half = half_of(length, unit)
    _unregister_halves(fd, start, half, unit)
    _unregister_halves(fd, start + half, length - half, unit)


cdef void _unregister_piece(int fd, int maps, uint64_t start, uint64_t length, uint64_t unit) noexcept nogil:
    """The kernel returns EINVAL for the whole piece if a part of it cannot be registered, such as a file that
    the target has mapped over it, or if nothing is mapped. The rest must be released all the same. The
    mappings are looked up in `maps`; with -1, or before Linux 6.11, that is not possible, and the piece is
    halved repeatedly."""
    cdef uint64_t end = start + length
    cdef vma_t vma
    cdef int err
    if uffd_unregister(fd, start, length) != EINVAL:
        return
    while start < end:
        err = next_vma(maps, start, &vma)
        if err and err != ENOENT:
            _unregister_halves(fd, start, end - start, unit)
            return
        if err or vma.start >= end:
            return
        start = max(start, vma.start)
        _unregister_halves(fd, start, min(vma.end, end) - start, unit)
        start = vma.end


cdef uint64_t _piece_end(capture_t *capture, region_t *region, uint64_t start, uint64_t end,
                         uint64_t most) noexcept nogil:
    """Where a piece ends that begins at `start` and holds at most `most` bytes. Units that hold nothing take
    no time and do not count; which these are is known from T on. Pieces end at multiples of 2 MiB, so that
    none ends inside a huge page, and of the region's own pages: the kernel refuses (EINVAL) a piece that ends
    inside a hugetlb page."""
    cdef uint64_t size = region.unit_pages * PAGE
    cdef uint64_t first, last, unit, n
    if not snap_load(&capture.armed):
        return min(end, max((start + max(most, UNKNOWN_MAX)) & ~(max(UNIT, size) - 1), start + size))
    if start < region.track_start or start >= region.track_end:     # the mapping has grown
        return min(end, region.track_start if start < region.track_start else start + most)
    # A region may begin inside a hugetlb page: the bytes before it in that page belong to its first unit.
    first = region.first_page + (max(start, region.addr) - region.addr) // PAGE
    last = (region.first_page + region.pages + 511) >> 9
    unit = bits_next(capture.filled, first >> 9, last)
    n = 0
    while unit < last and n < most // UNIT:
        n += 1
        unit = bits_next(capture.filled, unit + 1, last)
    if unit == last:
        return end
    return min(end, max(page_addr(region, unit << 9) & ~(size - 1), start + size))


cdef void _unregister_pieces(capture_t *capture, int fd, int maps, region_t *region, uint64_t start,
                             uint64_t end) noexcept nogil:
    cdef uint64_t unit = region.unit_pages * PAGE
    cdef uint64_t stop
    while start < end:
        stop = _piece_end(capture, region, start, end, max(PIECE, unit))
        _unregister_piece(fd, maps, start, stop - start, unit)
        start = stop


cdef void unregister_range(capture_t *capture, int fd, uint64_t start, uint64_t end) noexcept nogil:
    _unregister_piece(fd, capture.maps if fd == capture.uffds[0] else -1, start, end - start, PAGE)


cdef uint64_t registered_until(capture_t *capture, uint64_t addr, uint64_t end) noexcept nogil:
    cdef int place = place_of(capture, addr)
    while place < capture.n_regions and region_by_addr(capture, place).registered_start < addr:
        place += 1
    return min(end, region_by_addr(capture, place).registered_start) if place < capture.n_regions else end


cdef void _unregister_mappings(capture_t *capture, int fd, region_t *region) noexcept nogil:
    cdef uint64_t start = region.registered_start
    cdef uint64_t unit = region.unit_pages * PAGE
    cdef uint64_t end
    cdef uint64_t after = registered_until(capture, region.registered_end, <uint64_t>-1)
    cdef vma_t vma, grown
    cdef int err
    while start < region.registered_end:
        err = next_vma(capture.maps, start, &vma)
        if err:
            # No mapping is left, or (before Linux 6.11) the kernel cannot look one up.
            _unregister_pieces(capture, fd, capture.maps, region, start, region.registered_end)
            return
        start = max(start, vma.start)
        if start >= region.registered_end:
            return
        end = min(vma.end, after)
        end = _piece_end(capture, region, start, end, max(WHOLE_MAX, unit))
        _unregister_piece(fd, capture.maps, start, end - start, unit)
        start = end
        # It may have grown since it was looked up: the growth is a separate mapping now.
        while start < after and start == vma.end and not next_vma(capture.maps, start, &grown) \
                and same_vma(&vma, &grown):
            vma = grown
            start = min(grown.end, after)
            _unregister_piece(fd, capture.maps, grown.start, start - grown.start, unit)


cdef void _unregister_remaining(capture_t *capture, int fd, region_t *region) noexcept nogil:
    """All of a region except the units that a walker has unregistered: another tracker may have registered
    those since."""
    cdef uint64_t end = ((region.first_page + region.pages - 1) >> 9) + 1
    cdef uint64_t number = bits_next(capture.unregistered, region.first_page >> 9, end)
    cdef uint64_t start = region.registered_start
    cdef uint64_t addr
    while number < end:
        addr = page_addr(region, number << 9)
        _unregister_pieces(capture, fd, capture.maps, region, start, addr)
        start = addr + UNIT
        number = bits_next(capture.unregistered, number + 1, end)
    _unregister_pieces(capture, fd, capture.maps, region, start, region.registered_end)


cdef void unregister_all(capture_t *capture, int fd, bint children) noexcept nogil:
    """Closing the descriptor is not enough: a process that was forked meanwhile may hold a copy of it. Units
    that walkers have unregistered are unregistered for the target only, not for its `children`."""
    cdef int i
    cdef region_t *region
    for i in range(<int>capture.n_registered):
        region = &capture.regions[i]
        if children:
            _unregister_pieces(capture, fd, -1, region, region.registered_start, region.registered_end)
        elif capture.attached:
            _unregister_mappings(capture, fd, region)    # no walker unregisters there
        else:
            _unregister_remaining(capture, fd, region)
