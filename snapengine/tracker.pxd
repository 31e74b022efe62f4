from snapengine.session cimport Session


cdef class Tracker:
    # Write tracking of one session: threads that arm, serve faults, walk and release.
    cdef readonly Session session
    cdef bint running
