from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t

# Release all that the userfaultfd `fd` protects, the target's or (`children`) that of a forked child.
cdef void unregister_all(capture_t *capture, int fd, bint children) noexcept nogil
# Release [start, end) at once, wherever it is that of `fd`; it may lie in several mappings.
cdef void unregister_range(capture_t *capture, int fd, uint64_t start, uint64_t end) noexcept nogil
# Where in [addr, end) the first region begins, as far as it is registered; `end` if none does.
cdef uint64_t registered_until(capture_t *capture, uint64_t addr, uint64_t end) noexcept nogil
