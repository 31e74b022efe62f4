# Raises OSError(err, "call: text"); OSError selects the subclass. Every errno is raised by this function.
cdef int raise_oserror(int err, const char *call) except -1 with gil
