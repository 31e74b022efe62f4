"""Two-step arming: what writers hit between the first protection and T.

Protecting 1 GiB of 4 KiB pages takes 16 ms, in which a writer that meets a protected page would wait for T.
So the memory is protected while the target runs, and a fault is answered: the page is noted here and let go,
not copied. At T only what was hit is protected again, so the pause follows the hot set and not the memory.

    first walker  register, protect all ─────────► prearm_stop ► reprotect ► T
    fault threads        prearm_fault, release  … ──►│ none any more     faults wait │► claim, copy, release

It is as consistent as protecting all at once. No page is copied before T; at T every page is protected; and
from the first reprotect() until T no fault is answered, so a write that completes before T met a page
that was not protected yet, and is in the image with all that it depends on.

`hits` is written by fault threads (atomic or) before the page is let go, and read when they have stopped.
`noting` is written by the first walker; each fault thread stores `busy_since` and then loads `noting`, the
walker stores `noting` and then loads every `busy_since`, all four sequentially consistent: either the thread
sees that noting has ended, or the walker sees that it is busy and waits. If the fault thread stops in
between, T does not come; if the walker does, writers wait. The end of the process releases the target in
both cases.
"""

from snapengine.base.atomics cimport snap_fetch_or, snap_load, snap_load_seq, snap_pause, snap_store_seq
from snapengine.base.bitmap cimport bits_mask
from snapengine.base.pthreads cimport snap_sleep_ns
from snapengine.engine.readaround cimport run_from
from snapengine.engine.save cimport unit_of

cdef extern from "engine/controls.h" nogil:
    bint snap_control(bint on)

cdef int SPINS = 2000               # some 20 µs: what a fault thread in the middle of a release needs


cdef bint may_serve(capture_t *capture) noexcept nogil:
    return snap_load(&capture.armed) or snap_load_seq(&capture.prearm.active) \
        or snap_control(capture.serve_before_t)


cdef void prearm_fault(capture_t *capture, region_t *region, uint64_t page, uint64_t *first,
                       uint64_t *n) noexcept nogil:
    cdef uint64_t at, count
    unit_of(capture, region, page, first, n)
    if n[0] == 1:
        n[0] = run_from(capture, page, min(64 - (page & 63), region.first_page + region.pages - page))
    at = first[0]
    while at < first[0] + n[0]:
        count = min(64 - (at & 63), first[0] + n[0] - at)
        snap_fetch_or(&capture.prearm.dirty[at >> 6], bits_mask(at & 63, count))
        snap_fetch_or(&capture.prearm.dirty_units[at >> 15], <uint64_t>1 << (at >> 9 & 63))
        at += count


cdef void prearm_stop(capture_t *capture) noexcept nogil:
    cdef int i
    cdef int spins = 0
    snap_store_seq(&capture.prearm.active, 0)
    for i in range(1, capture.n_fault_lanes + 1):
        while snap_load_seq(&capture.lanes[i].busy_since):
            spins += 1
            if spins < SPINS:
                snap_pause()
            else:
                snap_sleep_ns(20000)    # it may wait for this CPU
