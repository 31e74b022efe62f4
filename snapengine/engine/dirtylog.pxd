from libc.stdint cimport int64_t, uint64_t

from snapengine.engine.session cimport Session


cdef class DirtyLog:
    # Dirty logging of one session: rounds, run by one Python thread that releases the GIL.
    cdef readonly Session session
    cdef bint registered
    cdef bint answering                   # the thread that answers missing faults runs
    cdef uint64_t deadline
    cdef double rate                      # pages a second, measured
    cdef uint64_t round_pages
    cdef int _first_round(self) except -1
    cdef int _round(self, bint wait) except -1
    cdef int64_t _dirty_pages(self) except -1
    cdef int _last_pages(self) except -1
