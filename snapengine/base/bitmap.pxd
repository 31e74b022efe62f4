from libc.stdint cimport uint64_t

from snapengine.base.atomics cimport snap_ctz, snap_fetch_or, snap_load

# Page bitmaps in 64-bit words, in memory that no capture protects (arena.pxd).


cdef inline uint64_t bits_claim(uint64_t *bits, uint64_t word, uint64_t mask) noexcept nogil:
    """Set the bits of `mask` in a word; return those that this call changed from 0 to 1.

    Exactly one caller wins each bit. The winner's writes before its claim are visible to the loser (acq_rel).
    """
    return mask & ~snap_fetch_or(&bits[word], mask)


cdef inline bint bits_test(uint64_t *bits, uint64_t page) noexcept nogil:
    return (snap_load(&bits[page >> 6]) >> (page & 63)) & 1


cdef inline uint64_t bits_mask(uint64_t first, uint64_t count) noexcept nogil:
    """Mask of the bits first .. first + count - 1 of one word; 1 ≤ count, first + count ≤ 64."""
    return (~<uint64_t>0 >> (64 - count)) << first


cdef inline uint64_t bits_run(uint64_t mask, uint64_t *first) noexcept nogil:
    """Length of the lowest run of set bits in a word, which must not be 0; stores its first bit."""
    cdef uint64_t rest
    first[0] = snap_ctz(mask)
    rest = ~(mask >> first[0])
    return min(<uint64_t>snap_ctz(rest), 64 - first[0]) if rest else 64


# Not atomic (one writer, or before the threads start): set or clear `count` bits from `first`.
cdef void bits_fill(uint64_t *bits, uint64_t first, uint64_t count) noexcept nogil
cdef void bits_clear(uint64_t *bits, uint64_t first, uint64_t count) noexcept nogil
# Atomic (acquire and release): set `count` bits from `first`; others may read or set bits at the same time.
cdef void bits_or(uint64_t *bits, uint64_t first, uint64_t count) noexcept nogil
# Number of set bits among `count` bits from `first`.
cdef uint64_t bits_count(uint64_t *bits, uint64_t first, uint64_t count) noexcept nogil
# First set bit in [first, end), or `end` if there is none.
cdef uint64_t bits_next(uint64_t *bits, uint64_t first, uint64_t end) noexcept nogil


cdef class Bitmap:
    # A bitmap of `pages` bits, for embedders and tests.
    cdef uint64_t *bits
    cdef readonly uint64_t pages
    cdef object arena
    cdef uint64_t claim_word(self, uint64_t word, uint64_t mask) noexcept nogil
