"""Read-around: how many pages a write fault takes along.

A writer that goes through memory in order would fault on every page. So whoever faults right behind the last
run that was let go gets a run twice as long, up to 64 pages: a sequential writer soon faults once in 64
pages, and one that jumps about pays nothing for it.

The table is a hint that all fault threads share, with relaxed loads and stores: if two of them meet, a run
is shorter or longer than it might be.
"""

from snapengine.atomics cimport snap_add, snap_peek, snap_set
from snapengine.session cimport STREAMS, stream_t

cdef uint64_t RUN_MAX = 64


cdef uint64_t run_for(capture_t *capture, uint64_t page, uint64_t most) noexcept nogil:
    cdef int i
    cdef uint64_t n = 1
    cdef stream_t *stream
    for i in range(STREAMS):
        stream = &capture.streams[i]
        if snap_peek(&stream.next_page) == page:
            n = min(2 * snap_peek(&stream.run_pages), RUN_MAX)
            break
    else:
        stream = &capture.streams[snap_add(&capture.next_stream, 1) % STREAMS]
    n = max(min(n, most), <uint64_t>1)
    snap_set(&stream.run_pages, n)
    snap_set(&stream.next_page, page + n)
    return n
