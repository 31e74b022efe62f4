"""Latency histogram: 8 buckets per power of two nanoseconds, no allocation, one writer."""

from snapengine.base.atomics cimport snap_add_one_writer, snap_load_relaxed

cdef extern from * nogil:
    """
    static inline int snap_msb(uint64_t x) { return 63 - __builtin_clzll(x); }
    """
    int snap_msb(uint64_t x)


cdef int bucket_of(uint64_t ns) noexcept nogil:
    cdef int msb
    if ns < 8:
        return <int>ns
    msb = snap_msb(ns)
    return (msb - 2) * 8 + <int>((ns >> (msb - 3)) & 7)


cdef uint64_t bucket_max_ns(int bucket) noexcept nogil:
    cdef int shift
    if bucket < 8:
        return bucket
    shift = bucket // 8 - 1
    return ((<uint64_t>(8 + bucket % 8) + 1) << shift) - 1


cdef uint64_t bucket_min_ns(int bucket) noexcept nogil:
    return bucket_max_ns(bucket - 1) + 1 if bucket else 0


cdef void histogram_add(histogram_t *histogram, uint64_t ns) noexcept nogil:
    snap_add_one_writer(&histogram.counts[bucket_of(ns)], 1)
    if ns > histogram.longest:
        histogram.longest = ns


cdef void histogram_merge(histogram_t *into, const histogram_t *other) noexcept nogil:
    cdef int i
    for i in range(HISTOGRAM_BUCKETS):
        into.counts[i] += snap_load_relaxed(&other.counts[i])
    into.longest = max(into.longest, other.longest)


cdef uint64_t histogram_quantile(const histogram_t *histogram, double share) noexcept nogil:
    cdef uint64_t total = 0
    cdef uint64_t seen = 0
    cdef int i
    for i in range(HISTOGRAM_BUCKETS):
        total += histogram.counts[i]
    if total == 0:
        return 0
    for i in range(HISTOGRAM_BUCKETS):
        seen += histogram.counts[i]
        if seen >= share * total:
            return min(bucket_max_ns(i), histogram.longest)
    return histogram.longest


def bucket_number(uint64_t ns):
    """Index of the bucket that counts `ns`."""
    return bucket_of(ns)


def bucket_floor(int bucket):
    """Smallest value in nanoseconds that a bucket counts."""
    return bucket_min_ns(bucket)


def quantiles(values, shares=(0.5, 0.99)):
    """Quantiles of `values` in nanoseconds, as computed by this histogram, then the exact maximum."""
    cdef histogram_t histogram
    cdef int i
    for i in range(HISTOGRAM_BUCKETS):
        histogram.counts[i] = 0
    histogram.longest = 0
    for value in values:
        histogram_add(&histogram, value)
    return [histogram_quantile(&histogram, share) for share in shares] + [histogram.longest]
