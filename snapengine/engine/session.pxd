from libc.stdint cimport uint64_t

from snapengine.base.arena cimport Arena
from snapengine.engine.state cimport capture_t, region_t
from snapengine.pipeline.pool cimport Pool
from snapengine.regions cimport RegionPlan


cdef class Session:
    # All state of one capture that capture threads touch. Tracker and DirtyLog run it.
    cdef capture_t *capture
    cdef readonly Pool pool
    cdef readonly int fault_lanes
    cdef readonly int walkers
    cdef Arena control
    cdef Arena lanes
    cdef Arena vmas
    cdef Arena descriptors                # uffds: readable in a forked child, which must close its copies
    cdef list bitmaps
    cdef object owned_fds
    cdef bint guarding                    # own memory: between guard_begin and guard_end
    cdef int _open_files(self) except -1
    cdef int _make_vma_table(self) except -1
    cdef uint64_t *_bitmap(self, uint64_t bits) except NULL
    cdef int _set_region(self, region_t *region, RegionPlan plan) except -1
    cdef int _sort_by_addr(self) except -1
    cdef int _make_bitmaps(self, bint rounds) except -1
    cdef int _make_lanes(self, bint sums) except -1
