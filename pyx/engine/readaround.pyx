"""Read-around: which pages a write fault saves along with its own.

- A writer that goes through memory in order would fault on every page. So a fault on the page right after the
  last run gets a run twice as long, up to 64 pages. Such a writer soon faults once in 64 pages.
- When faults are frequent, writers are stopped most of the time, and each fault costs CPU time that the walk
  needs: 14 µs in the target alone, 10 µs here. So while the mean time between faults is less than 100 µs,
  each fault saves the 16 pages around it. A stall then takes 29 instead of 16 µs, and there are a third as
  many. One writer at full speed over 1 GiB, two CPUs, no sink: it loses 244 instead of 331 ms of its work;
  three writers lose 240 instead of 480 ms.
  A walker that polls calls faults frequent when its last read returned more than one.
- Any other fault saves its page alone.

Before T only the first rule applies: every page that is released then must be protected again.

All state here is a hint that the fault threads share, with relaxed loads and stores. If two of them race, a
run is longer or shorter than it should be.
"""

from snapengine.base.atomics cimport snap_add, snap_load_relaxed, snap_store_relaxed
from snapengine.pipeline.pool cimport pool_has_any
from snapengine.base.pthreads cimport snap_now_ns
from snapengine.engine.state cimport STREAMS, stream_t

cdef uint64_t RUN_MAX = 64
cdef uint64_t AROUND = 16
cdef uint64_t FREQUENT_NS = 100000  # mean time between faults below which a fault takes AROUND pages
cdef uint64_t GAP_MAX_NS = 1000000  # one long pause must not count for many faults


cdef uint64_t run_from(capture_t *capture, uint64_t page, uint64_t most) noexcept nogil:
    cdef int i
    cdef uint64_t n = 1
    cdef stream_t *stream
    for i in range(STREAMS):
        stream = &capture.readaround.streams[i]
        if snap_load_relaxed(&stream.next_page) == page:
            n = min(2 * snap_load_relaxed(&stream.run_pages), RUN_MAX)
            break
    else:
        stream = &capture.readaround.streams[snap_add(&capture.readaround.next_stream, 1) % STREAMS]
    n = max(min(n, most), <uint64_t>1)
    snap_store_relaxed(&stream.run_pages, n)
    snap_store_relaxed(&stream.next_page, page + n)
    return n


cdef bint _faults_frequent(capture_t *capture) noexcept nogil:
    cdef uint64_t now = snap_now_ns()
    cdef uint64_t gap = min(now - snap_load_relaxed(&capture.readaround.last_fault_ns), GAP_MAX_NS)
    gap = (7 * snap_load_relaxed(&capture.readaround.gap_ns) + gap) // 8
    snap_store_relaxed(&capture.readaround.last_fault_ns, now)
    snap_store_relaxed(&capture.readaround.gap_ns, gap)
    return gap < FREQUENT_NS


cdef void run_around(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t *first,
                     uint64_t *n) noexcept nogil:
    cdef uint64_t end = region.first_page + region.pages
    cdef bint frequent = lane.waiting > 1 if lane.serving else _faults_frequent(capture)
    first[0] = page
    n[0] = run_from(capture, page, min(64 - (page & 63), end - page))
    if n[0] == 1 and frequent:
        first[0] = max(page & ~(AROUND - 1), region.first_page)
        n[0] = min((page | (AROUND - 1)) + 1, end) - first[0]
    # Slots of the reserve are used for this, too: a sink that is slower than the walk leaves no others free,
    # and then it matters most that faults are few. With no slot free, pages go to the spill file, so the run
    # is one page.
    if n[0] > 1 and not pool_has_any(capture.pool):
        first[0] = page
        n[0] = 1
