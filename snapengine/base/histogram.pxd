from libc.stdint cimport uint64_t

cdef enum:
    HISTOGRAM_BUCKETS = 512     # 8 per power of two nanoseconds: each at most 12.5 % wide


cdef struct histogram_t:
    # One writer. Readers see no torn counter, but not all counters at one instant.
    uint64_t counts[HISTOGRAM_BUCKETS]
    uint64_t longest


cdef int bucket_of(uint64_t ns) noexcept nogil
cdef uint64_t bucket_max_ns(int bucket) noexcept nogil      # largest value that the bucket counts
cdef uint64_t bucket_min_ns(int bucket) noexcept nogil      # smallest value that the bucket counts
cdef void histogram_add(histogram_t *histogram, uint64_t ns) noexcept nogil
cdef void histogram_merge(histogram_t *into, const histogram_t *other) noexcept nogil
# Quantile in ns for a `share` of the values (0 < share ≤ 1), exact to a bucket's width; 0 if empty.
cdef uint64_t histogram_quantile(const histogram_t *histogram, double share) noexcept nogil
