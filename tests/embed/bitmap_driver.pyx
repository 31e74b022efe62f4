"""Claims without the GIL, so that threads race for them; for tests/test_bitmap.py."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from snapengine.base.bitmap cimport Bitmap, bits_mask


cdef extern from * nogil:
    """
    static int arrived;
    static void meet(int n) {
        __atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL);
        while (__atomic_load_n(&arrived, __ATOMIC_ACQUIRE) % n)
            ;
    }
    """
    void meet(int n)


def claim_all(Bitmap bitmap not None, uint64_t run, int threads):
    """Claim every page in runs of `run` (at most 64); the pages that this thread won, word by word."""
    cdef uint64_t words = bitmap.pages // 64
    cdef uint64_t *won = <uint64_t *>calloc(words, 8)
    cdef uint64_t word, first
    with nogil:
        meet(threads)
        for word in range(words):
            first = 0
            while first < 64:
                won[word] |= bitmap.claim_word(word, bits_mask(first, min(run, 64 - first)))
                first += run
    result = [won[word] for word in range(words)]
    free(won)
    return result
