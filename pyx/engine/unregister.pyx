"""Letting go of everything that a userfaultfd protects, in pieces.

Each UFFDIO_UNREGISTER stops the target's page faults for its length: 28 ms per GiB of 4 KiB pages. So a
peer's memory is let go in pieces of half a millisecond. In memory of an attached process a piece that ends
inside a mapping would split it for a moment, and a mremap() over the edge would fail: there a piece
is a whole mapping, up to 1 GiB, and also what that has grown by.

Runs on the first walker, at the end, and on who reads the fork of one child too many.
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
cdef uint64_t PIECE = 16 << 20      # bytes: half a millisecond of 4 KiB pages
cdef uint64_t WHOLE_MAX = 1 << 30   # bytes: 28 ms
cdef uint64_t BLIND_MAX = 1 << 30   # bytes: how many of them hold something is not known


cdef void _halves(int fd, uint64_t start, uint64_t length, uint64_t unit) noexcept nogil:
    cdef uint64_t half
    if uffd_unregister(fd, start, length) != EINVAL or length <= unit:
        return
    half = half_of(length, unit)
    _halves(fd, start, half, unit)
    _halves(fd, start + half, length - half, unit)


cdef void _piece(int fd, int maps, uint64_t start, uint64_t length, uint64_t unit) noexcept nogil:
    """EINVAL for the whole piece when a part of it cannot be registered, such as a file that the target
    has mapped over it, or when nothing is mapped: the rest must be released all the same. `maps` tells what
    there is; -1, and before Linux 6.11: nobody can."""
    cdef uint64_t end = start + length
    cdef vma_t vma
    cdef int err
    if uffd_unregister(fd, start, length) != EINVAL:
        return
    while start < end:
        err = next_vma(maps, start, &vma)
        if err and err != ENOENT:
            _halves(fd, start, end - start, unit)
            return
        if err or vma.start >= end:
            return
        start = max(start, vma.start)
        _halves(fd, start, min(vma.end, end) - start, unit)
        start = vma.end


cdef uint64_t _piece_end(capture_t *capture, region_t *region, uint64_t start, uint64_t end,
                         uint64_t most) noexcept nogil:
    """Where a piece ends that begins at `start` and holds at most `most` bytes: what holds nothing is let go
    in no time, and does not count (which that is, is known from T on). Pieces end at multiples of 2 MiB,
    where no huge page lies on both sides, and of the region's own pages: the kernel refuses (EINVAL) a piece
    that ends inside a page of hugetlb."""
    cdef uint64_t size = region.unit_pages * PAGE
    cdef uint64_t first, last, unit, n
    if not snap_load(&capture.armed):
        return min(end, max((start + max(most, BLIND_MAX)) & ~(max(UNIT, size) - 1), start + size))
    if start < region.track_start or start >= region.track_end:     # it has grown
        return min(end, region.track_start if start < region.track_start else start + most)
    # A region may begin inside a page of hugetlb: what lies before it there belongs to its first unit.
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


cdef void _in_pieces(capture_t *capture, int fd, int maps, region_t *region, uint64_t start,
                     uint64_t end) noexcept nogil:
    cdef uint64_t unit = region.unit_pages * PAGE
    cdef uint64_t stop
    while start < end:
        stop = _piece_end(capture, region, start, end, max(PIECE, unit))
        _piece(fd, maps, start, stop - start, unit)
        start = stop


cdef void unregister_range(capture_t *capture, int fd, uint64_t start, uint64_t end) noexcept nogil:
    _piece(fd, capture.maps if fd == capture.uffds[0] else -1, start, end - start, PAGE)


cdef uint64_t registered_until(capture_t *capture, uint64_t addr, uint64_t end) noexcept nogil:
    cdef int place = place_of(capture, addr)
    while place < capture.n_regions and region_by_addr(capture, place).registered_start < addr:
        place += 1
    return min(end, region_by_addr(capture, place).registered_start) if place < capture.n_regions else end


cdef void _by_mapping(capture_t *capture, int fd, region_t *region) noexcept nogil:
    cdef uint64_t start = region.registered_start
    cdef uint64_t unit = region.unit_pages * PAGE
    cdef uint64_t end
    cdef uint64_t after = registered_until(capture, region.registered_end, <uint64_t>-1)
    cdef vma_t vma, grown
    cdef int err
    while start < region.registered_end:
        err = next_vma(capture.maps, start, &vma)
        if err:
            # None is left; or, before Linux 6.11, nobody can tell.
            _in_pieces(capture, fd, capture.maps, region, start, region.registered_end)
            return
        start = max(start, vma.start)
        if start >= region.registered_end:
            return
        end = min(vma.end, after)
        end = _piece_end(capture, region, start, end, max(WHOLE_MAX, unit))
        _piece(fd, capture.maps, start, end - start, unit)
        start = end
        # It may have grown since it was asked for: that is a mapping of its own now.
        while start < after and start == vma.end and not next_vma(capture.maps, start, &grown) \
                and same_vma(&vma, &grown):
            vma = grown
            start = min(grown.end, after)
            _piece(fd, capture.maps, grown.start, start - grown.start, unit)


cdef void _rest(capture_t *capture, int fd, region_t *region) noexcept nogil:
    """All of a region but the units that a walker has unregistered: somebody else may track those by now."""
    cdef uint64_t end = ((region.first_page + region.pages - 1) >> 9) + 1
    cdef uint64_t number = bits_next(capture.unregistered, region.first_page >> 9, end)
    cdef uint64_t start = region.registered_start
    cdef uint64_t addr
    while number < end:
        addr = page_addr(region, number << 9)
        _in_pieces(capture, fd, capture.maps, region, start, addr)
        start = addr + UNIT
        number = bits_next(capture.unregistered, number + 1, end)
    _in_pieces(capture, fd, capture.maps, region, start, region.registered_end)


cdef void unregister_all(capture_t *capture, int fd, bint children) noexcept nogil:
    """Closing it would not be enough: a process that was forked meanwhile may hold a copy of the descriptor.
    What walkers have unregistered, they did for the target alone, not for its `children`."""
    cdef int i
    cdef region_t *region
    for i in range(<int>capture.n_registered):
        region = &capture.regions[i]
        if children:
            _in_pieces(capture, fd, -1, region, region.registered_start, region.registered_end)
        elif capture.attached:
            _by_mapping(capture, fd, region)    # no walker unregisters there
        else:
            _rest(capture, fd, region)
