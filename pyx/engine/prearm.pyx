"""Two-step arming: pages that writers dirty between the first protection and T.

Protecting 1 GiB of 4 KiB pages takes 16 ms, in which a writer that faults on a protected page would wait for
T. So the first protection runs while the target runs, and faults are served meanwhile ("pre-arming"): the
page is recorded here and released, not copied. At T only the recorded pages are protected again, so the
length of the pause follows the hot set and not the size of the memory.

    first walker  register, protect all ─────────► prearm_stop ► reprotect ► T
    fault threads        prearm_fault, release  … ──►│ none any more     faults wait │► claim, copy, release

This is as consistent as protecting everything at once. No page is copied before T. At T every page is
protected. From the first reprotect() until T no fault is served. So a write that completes before T found
its page unprotected, and it is in the image with all writes that it depends on.

`prearm.dirty` is written by fault threads (atomic or) before the page is released, and read when no fault
thread is busy any more. `prearm.active` is written by the first walker. Each fault thread stores `busy_since`
and then loads `active`; the walker stores `active` and then loads every `busy_since`. All four accesses are
sequentially consistent: either the thread sees that pre-arming has ended, or the walker sees that the thread
is busy and waits. If the fault thread stops in between, T does not come. If the walker does, writers wait. In
both cases the kernel releases the target when the process ends.
"""

from snapengine.base.atomics cimport snap_fetch_or, snap_load, snap_load_seq, snap_pause, snap_store_seq
from snapengine.base.bitmap cimport bits_mask
from snapengine.base.pthreads cimport snap_sleep_ns
from snapengine.engine.readaround cimport run_from
from snapengine.engine.save cimport unit_of

cdef extern from "engine/controls.h" nogil:
    bint snap_control(bint on)

cdef int SPINS = 2000               # about 20 µs: the time that a fault thread needs to finish a release


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
                snap_sleep_ns(20000)    # the fault thread may need this CPU
