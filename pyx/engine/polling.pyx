"""Polling: the first walker reads page faults itself, between two windows of the walk.

When a fault thread serves a fault, it must be woken, needs a CPU, and must hand it back. While writers fault
all the time, the walk runs all the time, too, and one read of the userfaultfd costs it 0.3 µs. So the walker
serves the faults itself, one page each, and the fault threads sleep. One writer at full speed over 1 GiB, two
CPUs, no sink: p99 of its stalls is 65 instead of 98 to 164 µs, and the capture takes the same time.

    first walker   poll ► window ► poll ► window ► no room: stop_polling ► wait ► poll ...
    fault threads  (sleep: the epoll does not watch the descriptor)      │► serve │ (sleep)

`polled_ns` is the time of the last poll, or 0 if the walker does not poll. The first walker alone writes it
(release). It is set before the epoll stops watching the userfaultfd, and cleared after the epoll watches it
again: so it is not 0 whenever the userfaultfd is not watched. The watchdog reads it (acquire). The walker may
stop at any point in between, because it reads a page that the target has just discarded, or gets no CPU. Then
the watchdog finds the poll overdue and makes the epoll watch the userfaultfd again: writers wait for a few
milliseconds, not for ever.

`wake_requested` is set (release) after the epoll watches the userfaultfd again, by the watchdog, by a walker
that can release no page before an event is read, or by the first walker when it reads a fault on a huge page.
The first walker clears it, and leaves the faults to the fault threads for a while: where one page was
discarded, more are likely to follow. The request can arrive after the walker has resumed polling. Both then
serve faults until the walker sees the request.

The first walker polls only for memory of this process: a page of another process takes twice as long to copy,
and polls would be rare. It polls only the target's own userfaultfd: the fault threads serve those of forked
children. They also serve huge pages, since saving one takes as long as ten windows.
"""

from libc.stdint cimport uint64_t

from snapengine.base.atomics cimport snap_load, snap_load_relaxed, snap_store, snap_swap
from snapengine.engine.fault_threads cimport serve_deferred, serve_round
from snapengine.engine.watch cimport wake_fault_threads, watch_target
from snapengine.base.pthreads cimport snap_now_ns
from snapengine.engine.state cimport capture_fail

cdef uint64_t OVERDUE_NS = 2000000
cdef uint64_t REST_NS = 50000000


cdef void _watch(capture_t *capture, bint on) noexcept nogil:
    cdef int err = watch_target(capture, on)
    if err:
        capture_fail(capture, err, "epoll_ctl", 0)


cdef void stop_polling(capture_t *capture) noexcept nogil:
    if snap_load_relaxed(&capture.polling.polled_ns):
        _watch(capture, True)
        snap_store(&capture.polling.polled_ns, 0)


cdef void poll_faults(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef uint64_t now = snap_now_ns()
    cdef bint watched
    if snap_load_relaxed(&capture.polling.wake_requested) and snap_swap(&capture.polling.wake_requested, 0):
        stop_polling(capture)
        capture.polling.wakeups += 1
        capture.polling.not_before_ns = now + REST_NS
    if now < capture.polling.not_before_ns:
        return
    watched = snap_load_relaxed(&capture.polling.polled_ns) == 0
    snap_store(&capture.polling.polled_ns, now)
    if watched:
        _watch(capture, False)
    lane.serving = True
    serve_round(capture, lane, 0, now)
    serve_deferred(capture, lane)
    lane.serving = False


cdef void wake_if_overdue(capture_t *capture) noexcept nogil:
    cdef uint64_t polled = snap_load(&capture.polling.polled_ns)
    if polled and snap_now_ns() > polled + OVERDUE_NS:
        wake_fault_threads(capture)
