"""Counters of a capture: sums over its threads, service times of faults, lost memory.

Each counter is written by its own thread alone, with relaxed stores. A sum that is read while the threads run
may combine values of different moments.
"""

from libc.stdint cimport uint64_t

from snapengine.base.atomics cimport snap_load_relaxed
from snapengine.base.bitmap cimport bits_count, bits_next, bits_test
from snapengine.base.histogram cimport (
    HISTOGRAM_BUCKETS, bucket_min_ns, histogram_merge, histogram_quantile, histogram_t,
)
from snapengine.engine.state cimport lane_t, next_filled, page_addr, region_t


cdef dict sum_counters(capture_t *capture):
    cdef uint64_t data = 0, zero = 0, hole = 0, lost = 0, faults = 0, arming = 0
    cdef int i
    cdef lane_t *lane
    for i in range(capture.n_lanes):
        lane = &capture.lanes[i]
        data += snap_load_relaxed(&lane.data_pages)
        zero += snap_load_relaxed(&lane.zero_pages)
        hole += snap_load_relaxed(&lane.hole_pages)
        lost += snap_load_relaxed(&lane.lost_pages)
        faults += snap_load_relaxed(&lane.faults)
        arming += snap_load_relaxed(&lane.arming_faults)
    return {"data": data, "zero": zero, "hole": hole, "lost": lost, "faults": faults, "arming_faults": arming}


cdef object count_final_pages(capture_t *capture):
    cdef uint64_t page = 0, end = 0, count = 0
    while next_filled(capture, &page, capture.page_end, &end):
        count += bits_count(capture.data, page, end - page)
        page = end
    return count


cdef histogram_t _all_faults(capture_t *capture) noexcept:
    cdef histogram_t total = capture.lanes[0].histogram
    cdef int i
    for i in range(1, capture.n_lanes):
        histogram_merge(&total, &capture.lanes[i].histogram)
    return total


cdef dict fault_quantiles(capture_t *capture):
    cdef histogram_t total = _all_faults(capture)
    return {
        "p50": histogram_quantile(&total, 0.5),
        "p99": histogram_quantile(&total, 0.99),
        "max": total.longest,
    }


cdef list fault_buckets(capture_t *capture):
    cdef histogram_t total = _all_faults(capture)
    cdef int i
    return [(bucket_min_ns(i), total.counts[i]) for i in range(HISTOGRAM_BUCKETS) if total.counts[i]]


cdef list list_lost_runs(capture_t *capture):
    cdef uint64_t page, stop, last
    cdef uint64_t filled_end = 0
    cdef int i
    cdef region_t *region
    cdef list runs = []
    for i in range(capture.n_regions):
        region = &capture.regions[i]
        page = region.first_page
        stop = page + region.pages
        while next_filled(capture, &page, stop, &filled_end):
            page = bits_next(capture.lost, page, filled_end)
            while page < filled_end:
                last = page
                while last < filled_end and bits_test(capture.lost, last):
                    last += 1
                runs.append((page_addr(region, page), (last - page) * 4096))
                page = bits_next(capture.lost, last, filled_end)
    return runs
