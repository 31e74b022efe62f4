# cython: cdivision=True, boundscheck=False
"""The oracle: is this memory the state of a guest at one instant?

Owns nothing. Runs without the GIL over a buffer that holds the RAM of the image. The writes of a thread are
numbered 1, 2, ... and their pages follow from the parameters, so the cut is known up to one number per
thread: K, the newest write that the image shows. Consistent means:

* every page of the thread holds its last write up to K, and nothing newer or older;
* only the page of write K may be torn (its first words new, its last word old): the writer was in it;
* a write that another write has seen completed is in the image, completely (vector clocks);
* no other byte differs from the initial content.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free

from snapengine.guest.pattern cimport (
    BODY_WORD, CLOCK_WORD, HOLE, HOT, LAST_WORD, MAX_THREADS, PAGE_WORDS, Pattern, body_mismatch,
    owned_pages, page_class, page_of_write, pattern_of,
)


@dataclass(frozen=True)
class CutReport:
    """What `check_cut` found."""

    consistent: bool
    violation: str | None       # the first one: which page, what was expected, what was found
    writes: list[int]           # per thread: the newest write in the image (K)
    torn: list[bool]            # per thread: whether its writer stood in the middle of write K
    written_pages: int          # pages that hold at least one write
    untouched_hole_pages: int   # pages of holes that no write up to the cut has touched


cdef enum Fault:
    NONE, WRONG_WRITE, TORN, OWN_CLOCK, CAUSALITY, CLOCK_ORDER, SPARE_CLOCK, UNWRITTEN, BODY, COUNT

cdef struct Cut:
    const uint64_t *ram
    uint8_t *seen                       # per page: the walk has met its last write
    uint64_t[MAX_THREADS] newest        # K
    uint64_t[MAX_THREADS] complete      # K, or K - 1 where write K is torn
    Fault fault
    uint64_t page
    uint64_t thread
    uint64_t word
    uint64_t expected
    uint64_t found
    uint64_t written
    uint64_t untouched_holes


cdef Fault blame(Cut *c, Fault fault, uint64_t page, uint64_t thread, uint64_t word,
                 uint64_t expected, uint64_t found) noexcept nogil:
    c.fault, c.page, c.thread, c.word, c.expected, c.found = fault, page, thread, word, expected, found
    return fault


cdef inline const uint64_t *page_words(const Cut *c, uint64_t page) noexcept nogil:
    return c.ram + page * PAGE_WORDS


cdef void find_newest(const Pattern *p, Cut *c) noexcept nogil:
    cdef uint64_t page, thread = 0, first
    for page in range(p.pages):
        first = page_words(c, page)[0]
        if first > c.newest[thread]:
            c.newest[thread] = first
        thread += 1
        if thread == p.threads:
            thread = 0


cdef uint64_t previous_write(const Pattern *p, uint32_t thread, uint64_t k) noexcept nogil:
    """The write of the same page before write `k`, or 0."""
    cdef uint64_t page = page_of_write(p, thread, k)
    k -= 1
    while k and page_of_write(p, thread, k) != page:
        k -= 1
    return k


cdef Fault check_tip(const Pattern *p, Cut *c, uint32_t thread) noexcept nogil:
    """Is the page of write K whole, or torn in the one way that a writer can leave it?"""
    cdef uint64_t k = c.newest[thread], page, old, own
    cdef const uint64_t *words
    c.complete[thread] = k
    if k == 0:
        return NONE
    page = page_of_write(p, thread, k)
    words = page_words(c, page)
    if words[0] != k:  # some page claims a write that belongs elsewhere
        return blame(c, WRONG_WRITE, page, thread, 0, k, words[0])
    if words[LAST_WORD] == k:
        return NONE
    c.complete[thread] = k - 1
    old = previous_write(p, thread, k)
    if words[LAST_WORD] != old:
        return blame(c, TORN, page, thread, LAST_WORD, old, words[LAST_WORD])
    own = words[CLOCK_WORD + thread]
    if own != k - 1 and own != (old - 1 if old else 0):
        return blame(c, OWN_CLOCK, page, thread, CLOCK_WORD + thread, k - 1, own)
    return NONE


cdef Fault check_mark(const Pattern *p, Cut *c, uint32_t thread, uint64_t k, uint64_t page,
                      uint64_t *later) noexcept nogil:
    """The page of write `k`, its last one. `later`: the clock of the write after it that was checked."""
    cdef const uint64_t *words = page_words(c, page)
    cdef bint torn = k > c.complete[thread]
    cdef uint64_t clock
    cdef uint32_t u
    if words[0] != k:
        return blame(c, WRONG_WRITE, page, thread, 0, k, words[0])
    if not torn and words[LAST_WORD] != k:
        return blame(c, TORN, page, thread, LAST_WORD, k, words[LAST_WORD])
    for u in range(<uint32_t>MAX_THREADS):
        clock = words[CLOCK_WORD + u]
        if u >= p.threads:
            if clock:
                return blame(c, SPARE_CLOCK, page, thread, CLOCK_WORD + u, 0, clock)
        elif u == thread:
            if not torn and clock != k - 1:
                return blame(c, OWN_CLOCK, page, thread, CLOCK_WORD + u, k - 1, clock)
        elif clock > c.complete[u]:
            return blame(c, CAUSALITY, page, u, CLOCK_WORD + u, c.complete[u], clock)
        elif not torn:
            if clock > later[u]:
                return blame(c, CLOCK_ORDER, page, u, CLOCK_WORD + u, later[u], clock)
            later[u] = clock
    return NONE


cdef Fault check_thread(const Pattern *p, Cut *c, uint32_t thread) noexcept nogil:
    """Walk back from write K. The first visit of a page is its last write; once every page that the
    pattern can reach was met, older writes cannot matter."""
    cdef uint64_t k = c.newest[thread], page
    cdef uint64_t left = p.hot_pages if p.kind == HOT else owned_pages(p, thread)
    cdef uint64_t[MAX_THREADS] later
    cdef uint32_t u
    for u in range(<uint32_t>MAX_THREADS):
        later[u] = <uint64_t>-1
    while k and left:
        page = page_of_write(p, thread, k)
        if not c.seen[page]:
            c.seen[page] = 1
            left -= 1
            c.written += 1
            if check_mark(p, c, thread, k, page, later) != NONE:
                return c.fault
        k -= 1
    return NONE


cdef Fault check_bodies(const Pattern *p, Cut *c) noexcept nogil:
    cdef uint64_t page, word, expected
    cdef int64_t bad
    cdef const uint64_t *words
    for page in range(p.pages):
        words = page_words(c, page)
        if not c.seen[page]:
            for word in range(<uint64_t>BODY_WORD):
                if words[word]:
                    return blame(c, UNWRITTEN, page, page % p.threads, word, 0, words[word])
            if words[LAST_WORD]:
                return blame(c, UNWRITTEN, page, page % p.threads, LAST_WORD, 0, words[LAST_WORD])
            c.untouched_holes += page_class(p, page) == HOLE
        bad = body_mismatch(p, page, words, &expected)
        if bad >= 0:
            return blame(c, BODY, page, page % p.threads, bad, expected, words[bad])
    return NONE


cdef Fault check(const Pattern *p, Cut *c, const uint64_t *counts) noexcept nogil:
    cdef uint32_t t
    find_newest(p, c)
    for t in range(p.threads):
        if counts != NULL and c.newest[t] != counts[t]:
            return blame(c, COUNT, 0, t, 0, counts[t], c.newest[t])
    for t in range(p.threads):
        if check_tip(p, c, t) != NONE:
            return c.fault
    for t in range(p.threads):
        if counts != NULL and c.complete[t] != counts[t]:
            return blame(c, COUNT, page_of_write(p, t, counts[t]), t, LAST_WORD, counts[t], c.complete[t])
        if check_thread(p, c, t) != NONE:
            return c.fault
    return check_bodies(p, c)


cdef str describe(const Pattern *p, const Cut *c):
    kind = ("hole", "zero", "filled")[page_class(p, c.page)]
    where = f"page {c.page} (thread {c.page % p.threads}, {kind})"
    if c.fault == WRONG_WRITE:
        return f"{where}: expected write {c.expected}, found write {c.found}"
    if c.fault == TORN:
        return f"{where}: torn: first word {page_words(c, c.page)[0]}, last word {c.found}, not {c.expected}"
    if c.fault == OWN_CLOCK:
        return f"{where}: its own clock is {c.found}, not {c.expected}"
    if c.fault == CAUSALITY:
        return (f"{where}: saw write {c.found} of thread {c.thread} completed, "
                f"but the image ends at its write {c.expected}")
    if c.fault == CLOCK_ORDER:
        return (f"{where}: saw write {c.found} of thread {c.thread}, "
                f"a later write of its thread saw only {c.expected}")
    if c.fault == SPARE_CLOCK:
        return f"{where}: word {c.word} is {c.found}, expected 0 (there is no such thread)"
    if c.fault == UNWRITTEN:
        return f"{where}: word {c.word} is {c.found}, but no write up to the cut is for this page"
    if c.fault == BODY:
        return f"{where}: word {c.word} is {c.found:#x}, expected {c.expected:#x}"
    return f"thread {c.thread}: the image ends at write {c.found}, it stood paused after {c.expected}"


def check_cut(
    const unsigned char[::1] ram not None, params, counts: Sequence[int] | None = None
) -> CutReport:
    """Check that `ram` is the memory of the guest `params` at one instant.

    Parameters
    ----------
    ram
        All of the guest's RAM; bytes that the image holds as holes or zero pages are 0. 8-byte aligned.
    params : GuestParams
    counts
        Writes completed per thread, if the guest stood paused at T: then the cut must be exactly there.

    Raises
    ------
    ValueError
        `ram` or `counts` does not fit the parameters.
    MemoryError
    """
    cdef Pattern p = pattern_of(params)
    cdef Cut cut
    cdef uint64_t[MAX_THREADS] exact
    cdef bint has_counts = counts is not None
    cdef uint32_t t
    if <uint64_t>ram.shape[0] != p.pages * PAGE_WORDS * 8:
        raise ValueError(f"{ram.shape[0]} bytes of RAM, expected {params.size}")
    if <size_t>&ram[0] % 8:
        raise ValueError("the buffer is not aligned to 8 bytes")
    if has_counts and len(counts) != p.threads:
        raise ValueError(f"{len(counts)} counts for {p.threads} threads")
    cut.ram = <const uint64_t *>&ram[0]
    cut.fault, cut.written, cut.untouched_holes = NONE, 0, 0
    for t in range(<uint32_t>MAX_THREADS):
        cut.newest[t] = cut.complete[t] = 0
        exact[t] = counts[t] if has_counts and t < p.threads else 0
    cut.seen = <uint8_t *>calloc(p.pages, 1)
    if cut.seen == NULL:
        raise MemoryError
    try:
        with nogil:
            check(&p, &cut, exact if has_counts else NULL)
    finally:
        free(cut.seen)
    return CutReport(
        consistent=cut.fault == NONE,
        violation=None if cut.fault == NONE else describe(&p, &cut),
        writes=[cut.newest[t] for t in range(p.threads)],
        torn=[cut.complete[t] < cut.newest[t] for t in range(p.threads)],
        written_pages=cut.written,
        untouched_hole_pages=cut.untouched_holes,
    )
