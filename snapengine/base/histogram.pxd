from libc.stdint cimport uint64_t

cdef enum:
    HISTOGRAM_BUCKETS = 512     # 8 for each power of two of nanoseconds: at most 12.5 % wide


cdef struct histogram_t:
    # One writer (its thread); readers see each counter whole, not all at one instant.
    uint64_t counts[HISTOGRAM_BUCKETS]
    uint64_t longest


cdef int bucket_of(uint64_t ns) noexcept nogil
cdef uint64_t bucket_top(int bucket) noexcept nogil         # largest ns that falls into it
cdef uint64_t bucket_least(int bucket) noexcept nogil       # smallest ns that falls into it
cdef void histogram_add(histogram_t *histogram, uint64_t ns) noexcept nogil
cdef void histogram_merge(histogram_t *into, const histogram_t *other) noexcept nogil
# The ns that a share of all values (0 < share ≤ 1) does not exceed, to a bucket's width; 0 if empty.
cdef uint64_t histogram_quantile(const histogram_t *histogram, double share) noexcept nogil
