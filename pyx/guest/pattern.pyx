# cython: cdivision=True, boundscheck=False
"""The content and the order of writes of a guest's memory, as a function of its parameters.

Pure functions, any thread. The guest fills its RAM and the checker verifies an image with the same code, so
only the parameters are stored.

A page is 512 words of 8 bytes. Words 0 ... 8 and 511 are the mark of the last write; they are 0 in a page
that was never written, even if it is filled. The other words never change.
"""

from libc.string cimport memset

_KINDS = {"uniform": UNIFORM, "hot": HOT, "sequential": SEQUENTIAL}
_CLASSES = {HOLE: "hole", ZERO: "zero", FILLED: "filled"}

cdef enum:
    ZERO_UNIT_PAGES = 8     # zero pages come in runs, as they do in real memory
    HOLE_UNIT_PAGES = 16
    HUGE_PAGES = 512        # touching a page of a huge page populates all of it


cdef Pattern pattern_of(object params) except *:
    """The struct of a GuestParams, whose constructor has checked the ranges."""
    cdef Pattern p
    p.seed = params.seed
    p.pages = params.size // (8 * PAGE_WORDS)
    p.threads = params.threads
    p.kind = _KINDS[params.pattern]
    p.hot_pages = params.hot_size // (8 * PAGE_WORDS * p.threads)
    p.hole_unit_pages = HOLE_UNIT_PAGES if params.pages == "4k" else HUGE_PAGES
    p.zero_percent = params.zero_percent
    p.hole_percent = params.hole_percent
    p.incompressible = params.incompressible
    return p


cdef PageClass page_class(const Pattern *p, uint64_t page) noexcept nogil:
    # Holes are evenly spread, so that their share is exact even in a small guest with huge pages.
    cdef uint64_t unit = page // p.hole_unit_pages + p.seed % 100
    if unit * p.hole_percent % 100 < p.hole_percent:
        return HOLE
    if mix(p.seed ^ mix(~(page // ZERO_UNIT_PAGES))) % (100 - p.hole_percent) < p.zero_percent:
        return ZERO
    return FILLED


cdef inline uint64_t page_key(const Pattern *p, uint64_t page) noexcept nogil:
    return mix(p.seed + mix(page + 1))


cdef inline uint64_t filled_word(const Pattern *p, uint64_t key, uint64_t word) noexcept nogil:
    # Compressible: every fourth word is random, the others repeat; zstd level 1 compresses this 4:1.
    if p.incompressible or word % 4 == 0:
        return mix(key + word * <uint64_t>0x9E3779B97F4A7C15)
    return key * (word % 4)


cdef void fill_page(const Pattern *p, uint64_t page, uint64_t *words) noexcept nogil:
    """The initial content. The caller must skip holes, which are not to be touched."""
    cdef uint64_t key = page_key(p, page), word
    if page_class(p, page) != FILLED:
        memset(words, 0, 8 * PAGE_WORDS)
        return
    memset(words, 0, 8 * BODY_WORD)
    for word in range(<uint64_t>BODY_WORD, <uint64_t>LAST_WORD):
        words[word] = filled_word(p, key, word)
    words[LAST_WORD] = 0


cdef int64_t body_mismatch(const Pattern *p, uint64_t page, const uint64_t *words,
                           uint64_t *expected) noexcept nogil:
    cdef uint64_t key = page_key(p, page), word
    cdef bint filled = page_class(p, page) == FILLED
    for word in range(<uint64_t>BODY_WORD, <uint64_t>LAST_WORD):
        expected[0] = filled_word(p, key, word) if filled else 0
        if words[word] != expected[0]:
            return word
    return -1


def class_of(params, uint64_t page):
    """The page before the first write: ``"hole"``, ``"zero"`` or ``"filled"``."""
    cdef Pattern p = pattern_of(params)
    if page >= p.pages:
        raise IndexError(f"page {page} of {p.pages}")
    return _CLASSES[page_class(&p, page)]


def initial_page(params, uint64_t page):
    """The 4096 bytes of a page before the first write."""
    cdef Pattern p = pattern_of(params)
    cdef uint64_t[PAGE_WORDS] words
    if page >= p.pages:
        raise IndexError(f"page {page} of {p.pages}")
    fill_page(&p, page, words)
    return (<const char *>words)[:8 * PAGE_WORDS]


def write_page(params, uint32_t thread, uint64_t k):
    """The page of write `k` = 1, 2, ... of `thread`."""
    cdef Pattern p = pattern_of(params)
    if thread >= p.threads or k == 0:
        raise IndexError(f"write {k} of thread {thread}")
    return page_of_write(&p, thread, k)
