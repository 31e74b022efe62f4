"""Letting go of everything that a userfaultfd protects, in pieces.

Each UFFDIO_UNREGISTER stops the target's page faults for its length: 28 ms per GiB of 4 KiB pages. So a
peer's memory is let go in pieces of half a millisecond. In memory of an attached process a piece that ends
inside a mapping would split it for a moment, and a mremap() over the edge would fail: there a piece
is a whole mapping, up to 1 GiB, and also what that has grown by.

Runs on the first walker, at the end, and on who reads the fork of one child too many.
"""

from libc.errno cimport EINVAL
from libc.stdint cimport uint64_t

from snapengine.bitmap cimport bits_test
from snapengine.mapquery cimport next_vma, same_vma, vma_t
from snapengine.session cimport page_addr, region_t
from snapengine.uffd cimport uffd_unregister

cdef uint64_t PAGE = 4096
cdef uint64_t UNIT = 2 << 20
cdef uint64_t PIECE = 16 << 20      # bytes: half a millisecond of 4 KiB pages
cdef uint64_t WHOLE_MAX = 1 << 30   # bytes: 28 ms


cdef void _piece(int fd, uint64_t start, uint64_t length, uint64_t unit) noexcept nogil:
    """EINVAL for the whole piece when a part of it cannot be registered, such as a file that the target
    has mapped over it: the rest must be released all the same."""
    cdef uint64_t half
    if uffd_unregister(fd, start, length) != EINVAL or length <= unit:
        return
    half = length // 2 // unit * unit
    _piece(fd, start, half, unit)
    _piece(fd, start + half, length - half, unit)


cdef void _in_pieces(int fd, uint64_t start, uint64_t end, uint64_t unit) noexcept nogil:
    cdef uint64_t length
    while start < end:
        length = min(max(PIECE, unit), end - start)
        _piece(fd, start, length, unit)
        start += length


cdef void unregister_range(int fd, uint64_t start, uint64_t end) noexcept nogil:
    _piece(fd, start, end - start, PAGE)


cdef uint64_t _next_region(capture_t *capture, uint64_t addr) noexcept nogil:
    """Where the next region begins, as far as it is registered."""
    cdef int i
    cdef uint64_t found = <uint64_t>-1
    for i in range(capture.n_regions):
        if addr <= capture.regions[i].held_start < found:
            found = capture.regions[i].held_start
    return found


cdef void _by_mapping(capture_t *capture, int fd, region_t *region) noexcept nogil:
    cdef uint64_t start = region.held_start
    cdef uint64_t unit = region.unit_pages * PAGE
    cdef uint64_t end
    cdef uint64_t after = _next_region(capture, region.held_end)
    cdef vma_t vma, grown
    cdef int err
    while start < region.held_end:
        err = next_vma(capture.maps, start, &vma)
        if err:
            # None is left; or, before Linux 6.11, nobody can tell.
            _in_pieces(fd, start, region.held_end, unit)
            return
        start = max(start, vma.start)
        if start >= region.held_end:
            return
        end = min(vma.end, after)
        end = min(end, start + max(WHOLE_MAX, unit))
        _piece(fd, start, end - start, unit)
        start = end
        # It may have grown since it was asked for: that is a mapping of its own now.
        while start < after and start == vma.end and not next_vma(capture.maps, start, &grown) \
                and same_vma(&vma, &grown):
            vma = grown
            start = min(grown.end, after)
            _piece(fd, grown.start, start - grown.start, unit)


cdef void _rest(capture_t *capture, int fd, region_t *region) noexcept nogil:
    """All of a region but the units that a walker has unregistered: somebody else may track those by now."""
    cdef uint64_t last = region.first_page + region.pages - 1
    cdef uint64_t number = region.first_page >> 9
    cdef uint64_t start = region.held_start
    cdef uint64_t addr
    while number <= last >> 9:
        if bits_test(capture.gone, number):
            addr = page_addr(region, number << 9)
            _in_pieces(fd, start, addr, region.unit_pages * PAGE)
            start = addr + UNIT
        number += 1
    _in_pieces(fd, start, region.held_end, region.unit_pages * PAGE)


cdef void unregister_all(capture_t *capture, int fd, bint children) noexcept nogil:
    """Closing it would not be enough: a process that was forked meanwhile may hold a copy of the descriptor.
    What walkers have unregistered, they did for the target alone, not for its `children`."""
    cdef int i
    cdef region_t *region
    for i in range(<int>capture.n_registered):
        region = &capture.regions[i]
        if children:
            _in_pieces(fd, region.held_start, region.held_end, region.unit_pages * PAGE)
        elif capture.attached:
            _by_mapping(capture, fd, region)    # no walker unregisters there
        else:
            _rest(capture, fd, region)
