from snapengine.session cimport capture_t

# Release all that the userfaultfd `fd` protects, the target's or (`children`) that of a forked child.
cdef void unregister_all(capture_t *capture, int fd, bint children) noexcept nogil
