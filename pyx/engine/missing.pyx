"""Dirty logging: the thread that answers missing faults.

Shared memory is registered for missing faults for one reason: a page that is punched out of its file and
touched again returns as zeros with its earlier protection, and in WP_ASYNC mode no scan of the page tables
reports it as written (Linux 6.18). A page that UFFDIO_ZEROPAGE fills is not protected, so the next scan
reports it.

This thread never touches the target's memory. The thread that copies does, and may itself wait for a missing
page. `stopping` (release, by the caller of stop_missing; read with acquire) and a write to the stop event end
it. If the process ends, the kernel releases all waiters.
"""

from snapengine.base.atomics cimport snap_load, snap_store
from snapengine.engine.fault_threads cimport answer_missing
from snapengine.base.poll cimport POLLIN, poll, pollfd
from snapengine.base.pthreads cimport pthread_join, snap_name_thread, snap_thread_start

cdef extern from "<unistd.h>" nogil:
    long write(int fd, const void *data, size_t count)


cdef void *_answer(void *arg) noexcept nogil:
    cdef lane_t *lane = <lane_t *>arg
    cdef capture_t *capture = lane.capture
    cdef pollfd watched[2]
    snap_name_thread("snap-missing")
    watched[0].fd = capture.uffds[0]
    watched[1].fd = capture.stop_event
    watched[0].events = watched[1].events = POLLIN
    while not snap_load(&capture.stopping):
        poll(watched, 2, -1)
        answer_missing(capture, lane)
    return NULL


cdef int start_missing(capture_t *capture, lane_t *lane) noexcept nogil:
    return snap_thread_start(&lane.thread, _answer, lane)


cdef void stop_missing(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef unsigned long long one = 1
    snap_store(&capture.stopping, 1)
    write(capture.stop_event, &one, sizeof(one))
    pthread_join(lane.thread, NULL)
