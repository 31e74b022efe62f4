# The one door for errno: raises OSError(err, "call: text"); OSError picks its own subclass.
cdef int raise_oserror(int err, const char *call) except -1 with gil
