from snapengine.engine.session cimport Session
from snapengine.engine.state cimport capture_t


cdef class Tracker:
    # Write tracking of one session: threads that arm, serve faults, walk and release.
    cdef readonly Session session
    cdef bint running
    cdef int owner                        # the pid of the process that created the threads
    cdef int _make_threads(self, capture_t *capture) except -1
    cdef void _join_all(self) noexcept nogil
    cdef int _drop_epoll(self) except -1
