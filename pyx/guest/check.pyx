# cython: cdivision=True, boundscheck=False
"""The oracle: check whether memory is the state of a guest at one instant.

Owns nothing. Runs without the GIL over a buffer that holds the RAM of the image. The writes of a thread are
numbered 1, 2, ... and their pages follow from the parameters. So one number per thread determines the cut: K,
the newest write in the image. The image is consistent if:

* every page of the thread holds its last write up to K, and nothing newer or older;
* only the page of write K is torn (first words new, last word old): T was in the middle of that write;
* a write that another write saw as completed is completely in the image (vector clocks);
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
    violation: str | None       # the first one: the page, what was expected and what was found
    writes: list[int]           # per thread: the newest write in the image (K)
    torn: list[bool]            # per thread: whether write K is incomplete
    written_pages: int          # pages that hold at least one write
    untouched_hole_pages: int   # pages of holes without a write up to the cut


cdef enum Violation:
    NONE, WRONG_WRITE, TORN, OWN_CLOCK, CAUSALITY, CLOCK_ORDER, SPARE_CLOCK, UNWRITTEN, BODY, COUNT

cdef struct Cut:
    const uint64_t *ram
    uint8_t *seen                       # per page: check_thread() has found its last write
    uint64_t[MAX_THREADS] newest        # K
    uint64_t[MAX_THREADS] complete      # K, or K - 1 where write K is torn
    Violation violation
    uint64_t page
    uint64_t thread
    uint64_t word
    uint64_t expected
    uint64_t found
    uint64_t written
    uint64_t untouched_holes


cdef Violation report(Cut *c, Violation violation, uint64_t page, uint64_t thread, uint64_t word,
                      uint64_t expected, uint64_t found) noexcept nogil:
    c.violation, c.page, c.thread, c.word = violation, page, thread, word
    c.expected, c.found = expected, found
    return violation


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


cdef Violation check_tip(const Pattern *p, Cut *c, uint32_t thread) noexcept nogil:
    """The page of write K is complete, or torn in the only way that a writer can leave it."""
    cdef uint64_t k = c.newest[thread], page, old, own
    cdef const uint64_t *words
    c.complete[thread] = k
    if k == 0:
        return NONE
    page = page_of_write(p, thread, k)
    words = page_words(c, page)
    if words[0] != k:  # another page holds the number of this write
        return report(c, WRONG_WRITE, page, thread, 0, k, words[0])
    if words[LAST_WORD] == k:
        return NONE
    c.complete[thread] = k - 1
    old = previous_write(p, thread, k)
    if words[LAST_WORD] != old:
        return report(c, TORN, page, thread, LAST_WORD, old, words[LAST_WORD])
    own = words[CLOCK_WORD + thread]
    if own != k - 1 and own != (old - 1 if old else 0):
        return report(c, OWN_CLOCK, page, thread, CLOCK_WORD + thread, k - 1, own)
    return NONE


cdef Violation check_mark(const Pattern *p, Cut *c, uint32_t thread, uint64_t k, uint64_t page,
                          uint64_t *later) noexcept nogil:
    """The page of write `k`, its last one. `later`: the clock of the next write, which was checked before."""
    cdef const uint64_t *words = page_words(c, page)
    cdef bint torn = k > c.complete[thread]
    cdef uint64_t clock
    cdef uint32_t u
    if words[0] != k:
        return report(c, WRONG_WRITE, page, thread, 0, k, words[0])
    if not torn and words[LAST_WORD] != k:
        return report(c, TORN, page, thread, LAST_WORD, k, words[LAST_WORD])
    for u in range(<uint32_t>MAX_THREADS):
        clock = words[CLOCK_WORD + u]
        if u >= p.threads:
            if clock:
                return report(c, SPARE_CLOCK, page, thread, CLOCK_WORD + u, 0, clock)
        elif u == thread:
            if not torn and clock != k - 1:
                return report(c, OWN_CLOCK, page, thread, CLOCK_WORD + u, k - 1, clock)
        elif clock > c.complete[u]:
            return report(c, CAUSALITY, page, u, CLOCK_WORD + u, c.complete[u], clock)
        elif not torn:
            if clock > later[u]:
                return report(c, CLOCK_ORDER, page, u, CLOCK_WORD + u, later[u], clock)
            later[u] = clock
    return NONE


cdef Violation check_thread(const Pattern *p, Cut *c, uint32_t thread) noexcept nogil:
    """Go back from write K: the first write found for a page is its last one. Ends when every page that the
    pattern reaches was found, as older writes do not matter."""
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
                return c.violation
        k -= 1
    return NONE


cdef Violation check_bodies(const Pattern *p, Cut *c) noexcept nogil:
    cdef uint64_t page, word, expected
    cdef int64_t bad
    cdef const uint64_t *words
    for page in range(p.pages):
        words = page_words(c, page)
        if not c.seen[page]:
            for word in range(<uint64_t>BODY_WORD):
                if words[word]:
                    return report(c, UNWRITTEN, page, page % p.threads, word, 0, words[word])
            if words[LAST_WORD]:
                return report(c, UNWRITTEN, page, page % p.threads, LAST_WORD, 0, words[LAST_WORD])
            c.untouched_holes += page_class(p, page) == HOLE
        bad = body_mismatch(p, page, words, &expected)
        if bad >= 0:
            return report(c, BODY, page, page % p.threads, bad, expected, words[bad])
    return NONE


cdef Violation check(const Pattern *p, Cut *c, const uint64_t *counts) noexcept nogil:
    cdef uint32_t t
    find_newest(p, c)
    for t in range(p.threads):
        if counts != NULL and c.newest[t] != counts[t]:
            return report(c, COUNT, 0, t, 0, counts[t], c.newest[t])
    for t in range(p.threads):
        if check_tip(p, c, t) != NONE:
            return c.violation
    for t in range(p.threads):
        if counts != NULL and c.complete[t] != counts[t]:
            return report(c, COUNT, page_of_write(p, t, counts[t]), t, LAST_WORD, counts[t], c.complete[t])
        if check_thread(p, c, t) != NONE:
            return c.violation
    return check_bodies(p, c)


cdef str describe(const Pattern *p, const Cut *c):
    kind = ("hole", "zero", "filled")[page_class(p, c.page)]
    where = f"page {c.page} (thread {c.page % p.threads}, {kind})"
    if c.violation == WRONG_WRITE:
        return f"{where}: expected write {c.expected}, found write {c.found}"
    if c.violation == TORN:
        return f"{where}: torn: first word {page_words(c, c.page)[0]}, last word {c.found}, not {c.expected}"
    if c.violation == OWN_CLOCK:
        return f"{where}: its own clock is {c.found}, not {c.expected}"
    if c.violation == CAUSALITY:
        return (f"{where}: saw write {c.found} of thread {c.thread} completed, "
                f"but the image ends at its write {c.expected}")
    if c.violation == CLOCK_ORDER:
        return (f"{where}: saw write {c.found} of thread {c.thread}, "
                f"a later write of its thread saw only {c.expected}")
    if c.violation == SPARE_CLOCK:
        return f"{where}: word {c.word} is {c.found}, expected 0 (there is no such thread)"
    if c.violation == UNWRITTEN:
        return f"{where}: word {c.word} is {c.found}, but no write up to the cut is for this page"
    if c.violation == BODY:
        return f"{where}: word {c.word} is {c.found:#x}, expected {c.expected:#x}"
    return f"thread {c.thread}: the image ends at write {c.found}, the guest was paused after {c.expected}"


def check_cut(
    const unsigned char[::1] ram not None, params, counts: Sequence[int] | None = None
) -> CutReport:
    """Check that `ram` is the memory of a guest with these parameters at one instant.

    Parameters
    ----------
    ram
        The guest's RAM, aligned to 8 bytes; holes and zero pages of the image are 0.
    params : GuestParams
    counts
        Completed writes per thread if the guest was paused at T: the cut must be exactly there.

    Raises
    ------
    ValueError
        The size of `ram` or the length of `counts` does not match the parameters.
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
    cut.violation, cut.written, cut.untouched_holes = NONE, 0, 0
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
        consistent=cut.violation == NONE,
        violation=None if cut.violation == NONE else describe(&p, &cut),
        writes=[cut.newest[t] for t in range(p.threads)],
        torn=[cut.complete[t] < cut.newest[t] for t in range(p.threads)],
        written_pages=cut.written,
        untouched_hole_pages=cut.untouched_holes,
    )
