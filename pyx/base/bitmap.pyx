"""Claim bitmaps: one bit per page, changed from 0 to 1 by exactly one thread.

All threads of a capture claim pages here. The memory comes from an arena, so that no claim can fault on
memory that the capture protects.
"""

from snapengine.base.arena cimport Arena
from snapengine.base.atomics cimport snap_ctz, snap_fetch_or, snap_popcount


cdef void bits_fill(uint64_t *bits, uint64_t first, uint64_t count) noexcept nogil:
    cdef uint64_t offset, n
    while count:
        offset = first & 63
        n = min(64 - offset, count)
        bits[first >> 6] |= bits_mask(offset, n)
        first += n
        count -= n


cdef void bits_or(uint64_t *bits, uint64_t first, uint64_t count) noexcept nogil:
    cdef uint64_t offset, n
    while count:
        offset = first & 63
        n = min(64 - offset, count)
        snap_fetch_or(&bits[first >> 6], bits_mask(offset, n))
        first += n
        count -= n


cdef void bits_clear(uint64_t *bits, uint64_t first, uint64_t count) noexcept nogil:
    cdef uint64_t offset, n
    while count:
        offset = first & 63
        n = min(64 - offset, count)
        if bits[first >> 6] & bits_mask(offset, n):     # do not populate a page that was never written
            bits[first >> 6] &= ~bits_mask(offset, n)
        first += n
        count -= n


cdef uint64_t bits_count(uint64_t *bits, uint64_t first, uint64_t count) noexcept nogil:
    cdef uint64_t offset, n
    cdef uint64_t total = 0
    while count:
        offset = first & 63
        n = min(64 - offset, count)
        total += snap_popcount(bits[first >> 6] & bits_mask(offset, n))
        first += n
        count -= n
    return total


cdef uint64_t bits_next(uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t word
    while first < end:
        word = bits[first >> 6] >> (first & 63)
        if word:
            return min(first + snap_ctz(word), end)
        first = (first | 63) + 1
    return end


cdef class Bitmap:
    """`pages` bits, initially clear.

    `claim` is atomic. `count` is not: concurrent claims may or may not be counted.
    """

    def __cinit__(self, uint64_t pages):
        if not 0 < pages <= <uint64_t>1 << 40:
            raise ValueError(f"pages: {pages} is not in 1 ... 2^40")
        cdef Arena arena = Arena((pages + 63) // 64 * 8)
        self.arena = arena
        self.bits = <uint64_t *>arena.base
        self.pages = pages

    cdef uint64_t claim_word(self, uint64_t word, uint64_t mask) noexcept nogil:
        return bits_claim(self.bits, word, mask)

    def claim(self, uint64_t page):
        """Claim one page. Returns True to exactly one caller. Raises IndexError past the end."""
        if page >= self.pages:
            raise IndexError(f"page {page} of {self.pages}")
        return self.claim_word(page >> 6, <uint64_t>1 << (page & 63)) != 0

    def test(self, uint64_t page):
        """Whether the page is claimed. Raises IndexError past the end."""
        if page >= self.pages:
            raise IndexError(f"page {page} of {self.pages}")
        return bits_test(self.bits, page)

    def count(self):
        """Number of claimed pages."""
        return bits_count(self.bits, 0, self.pages)

    def next(self, uint64_t first):
        """The first claimed page at or after `first`, or `pages`."""
        return bits_next(self.bits, first, self.pages)
