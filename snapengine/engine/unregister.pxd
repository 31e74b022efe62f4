from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t

# Unregister all memory that the userfaultfd `fd` protects: the target's or, with `children`, a forked
# child's.
cdef void unregister_all(capture_t *capture, int fd, bint children) noexcept nogil
# Unregister the parts of [start, end) that are registered with `fd`, in one piece. The range may lie in
# several mappings.
cdef void unregister_range(capture_t *capture, int fd, uint64_t start, uint64_t end) noexcept nogil
# Where in [addr, end) the first region's registered range begins; `end` if none does.
cdef uint64_t registered_until(capture_t *capture, uint64_t addr, uint64_t end) noexcept nogil
