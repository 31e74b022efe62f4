"""State that capture threads share: lookups by page and by address, and the failure of a capture.

The structs are in `snapengine/engine/state.pxd`, which names the writer of each word. Nothing here allocates
memory or takes the GIL. docs/how/threads.md has the table of shared words.
"""

from snapengine.base.atomics cimport snap_swap_if
from snapengine.base.bitmap cimport bits_clear, bits_fill, bits_next, bits_or, bits_test
from snapengine.base.pthreads cimport pthread_cond_broadcast, pthread_mutex_lock, pthread_mutex_unlock
from snapengine.pipeline.pool cimport pool_fail


cdef void capture_fail(capture_t *capture, int err, const char *call, uint64_t addr) noexcept nogil:
    if snap_swap_if(&capture.failed, 0, err):
        capture.failed_call = call
        capture.failed_addr = addr
    pool_fail(capture.pool)
    pthread_mutex_lock(&capture.lock)
    pthread_cond_broadcast(&capture.changed)
    pthread_cond_broadcast(&capture.parallel.wanted)
    pthread_mutex_unlock(&capture.lock)


cdef region_t *region_by_addr(capture_t *capture, int place) noexcept nogil:
    return &capture.regions[capture.by_addr[place]]


cdef int place_of(capture_t *capture, uint64_t addr) noexcept nogil:
    cdef int low = 0
    cdef int high = capture.n_regions
    cdef int middle
    while low < high:
        middle = (low + high) // 2
        if region_by_addr(capture, middle).track_end <= addr:
            low = middle + 1
        else:
            high = middle
    return low


cdef region_t *region_at(capture_t *capture, uint64_t addr) noexcept nogil:
    cdef int place = place_of(capture, addr)
    cdef region_t *region
    if place == capture.n_regions:
        return NULL
    region = region_by_addr(capture, place)
    return region if region.track_start <= addr else NULL


cdef void note_filled(capture_t *capture, uint64_t first, uint64_t n) noexcept nogil:
    bits_or(capture.filled, first >> 9, ((first + n - 1) >> 9) - (first >> 9) + 1)


cdef void note_present(capture_t *capture, uint64_t first, uint64_t n) noexcept nogil:
    bits_fill(capture.present, first, n)
    note_filled(capture, first, n)


cdef bint next_filled(capture_t *capture, uint64_t *page, uint64_t end, uint64_t *run_end) noexcept nogil:
    cdef uint64_t last = (end + 511) >> 9
    cdef uint64_t unit
    if page[0] >= end:
        return False
    unit = bits_next(capture.filled, page[0] >> 9, last)
    if unit == last:
        return False
    page[0] = max(page[0], unit << 9)
    while unit < last and bits_test(capture.filled, unit):
        unit += 1
    run_end[0] = min(unit << 9, end)
    return True


cdef void clear_pages(capture_t *capture, uint64_t *bits, uint64_t first, uint64_t n) noexcept nogil:
    cdef uint64_t end = first + n
    cdef uint64_t run_end = 0
    while next_filled(capture, &first, end, &run_end):
        bits_clear(bits, first, run_end - first)
        first = run_end


cdef uint64_t page_addr(region_t *region, uint64_t page) noexcept nogil:
    return region.addr + (page - region.first_page) * 4096


cdef uint64_t page_at(region_t *region, uint64_t addr) noexcept nogil:
    addr = min(max(addr, region.addr), region.addr + (region.pages - 1) * 4096)
    return region.first_page + (addr - region.addr) // 4096
