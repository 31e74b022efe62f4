# The guest's memory as a function of its parameters. The guest, its writers and the checker share it.
from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from * nogil:
    """
    static inline uint64_t guest_mulhi(uint64_t a, uint64_t b) {
        return (uint64_t)(((unsigned __int128)a * b) >> 64);
    }
    """
    uint64_t guest_mulhi(uint64_t a, uint64_t b)

cdef enum:
    MAX_THREADS = 8
    PAGE_WORDS = 512
    CLOCK_WORD = 1        # words 1 ... 8: the vector clock
    BODY_WORD = 9         # the first word that no write changes
    LAST_WORD = 511

cdef enum PatternKind:
    UNIFORM, HOT, SEQUENTIAL

cdef enum PageClass:
    HOLE, ZERO, FILLED

cdef struct Pattern:
    uint64_t seed
    uint64_t pages            # of 4096 bytes
    uint64_t hot_pages        # of one thread
    uint64_t hole_unit_pages  # the size of a hole is a multiple of this
    uint32_t threads
    uint32_t kind             # PatternKind
    uint32_t zero_percent
    uint32_t hole_percent
    uint32_t incompressible

cdef Pattern pattern_of(object params) except *
cdef void fill_page(const Pattern *p, uint64_t page, uint64_t *words) noexcept nogil
# The first word of the body that differs from the initial content, or -1; `expected` is set to that content.
cdef int64_t body_mismatch(const Pattern *p, uint64_t page, const uint64_t *words,
                           uint64_t *expected) noexcept nogil
cdef PageClass page_class(const Pattern *p, uint64_t page) noexcept nogil


cdef inline uint64_t mix(uint64_t x) noexcept nogil:
    # The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection with good avalanche.
    x = (x ^ (x >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * <uint64_t>0x94D049BB133111EB
    return x ^ (x >> 31)


cdef inline uint64_t owned_pages(const Pattern *p, uint32_t thread) noexcept nogil:
    return (p.pages - thread + p.threads - 1) // p.threads


# The page of write k = 1, 2, ... of a thread.
cdef inline uint64_t page_of_write(const Pattern *p, uint32_t thread, uint64_t k) noexcept nogil:
    cdef uint64_t owned = owned_pages(p, thread), index
    cdef uint64_t random = mix(p.seed ^ mix(thread + 1)) + k * <uint64_t>0x9E3779B97F4A7C15
    if p.kind == SEQUENTIAL:
        index = (k - 1) % owned
    elif p.kind == UNIFORM:
        index = guest_mulhi(mix(random), owned)
    else:  # the same start for every thread, so that the hot set is one run of pages
        index = guest_mulhi(mix(p.seed), owned) + guest_mulhi(mix(random), p.hot_pages)
        if index >= owned:
            index -= owned
    return index * p.threads + thread
