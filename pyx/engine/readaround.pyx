"""Read-around: which pages a write fault takes along.

- A writer that goes through memory in order would fault on every page. So who faults right behind the last
  run that was let go gets a run twice as long, up to 64 pages: it soon faults once in 64 pages.
- Where faults come thick, the writers stand most of the time, and each fault costs CPU time that the walk
  needs: 14 µs in the target alone, 10 here. So while they are less than 100 µs apart, each saves the 16 pages
  around it. A stall then takes 29 instead of 16 µs, and there are a third as many: with one writer at full
  speed over 1 GiB, two CPUs and no sink, it loses 244 instead of 331 ms of its work, three writers 240
  instead of 480.
- Any other fault takes its page alone.

Before T only the first applies: what is let go then must be protected again.

All of it is a hint that the fault threads share, with relaxed loads and stores: if two of them meet, a run is
shorter or longer than it might be.
"""

from snapengine.base.atomics cimport snap_add, snap_peek, snap_set
from snapengine.pipeline.pool cimport pool_has_any
from snapengine.base.pthreads cimport snap_now_ns
from snapengine.engine.state cimport STREAMS, stream_t

cdef uint64_t RUN_MAX = 64
cdef uint64_t AROUND = 16
cdef uint64_t THICK_NS = 100000     # mean time between faults, below which they take AROUND pages
cdef uint64_t GAP_MAX_NS = 1000000  # one long pause must not count for many faults


cdef uint64_t run_from(capture_t *capture, uint64_t page, uint64_t most) noexcept nogil:
    cdef int i
    cdef uint64_t n = 1
    cdef stream_t *stream
    for i in range(STREAMS):
        stream = &capture.readaround.streams[i]
        if snap_peek(&stream.next_page) == page:
            n = min(2 * snap_peek(&stream.run_pages), RUN_MAX)
            break
    else:
        stream = &capture.readaround.streams[snap_add(&capture.readaround.next_stream, 1) % STREAMS]
    n = max(min(n, most), <uint64_t>1)
    snap_set(&stream.run_pages, n)
    snap_set(&stream.next_page, page + n)
    return n


cdef bint _thick(capture_t *capture) noexcept nogil:
    cdef uint64_t now = snap_now_ns()
    cdef uint64_t gap = min(now - snap_peek(&capture.readaround.last_fault_ns), GAP_MAX_NS)
    gap = (7 * snap_peek(&capture.readaround.gap_ns) + gap) // 8
    snap_set(&capture.readaround.last_fault_ns, now)
    snap_set(&capture.readaround.gap_ns, gap)
    return gap < THICK_NS


cdef void run_around(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t *first,
                     uint64_t *n) noexcept nogil:
    cdef uint64_t end = region.first_page + region.pages
    cdef bint thick = lane.waiting > 1 if lane.serving else _thick(capture)
    first[0] = page
    n[0] = run_from(capture, page, min(64 - (page & 63), end - page))
    if n[0] == 1 and thick:
        first[0] = max(page & ~(AROUND - 1), region.first_page)
        n[0] = min((page | (AROUND - 1)) + 1, end) - first[0]
    # The reserve is enough: a sink that is slower than the walk leaves no more free, and there few faults
    # count most. With nothing free it goes through the spill file: no more than must be.
    if n[0] > 1 and not pool_has_any(capture.pool):
        first[0] = page
        n[0] = 1
