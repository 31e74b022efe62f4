from libc.stdint cimport uint64_t

from snapengine.kernel.procmap_query cimport vma_t
from snapengine.engine.state cimport capture_t

# Read all mappings of the target into the table, if the kernel cannot look up a single one (before Linux
# 6.11). 0 or errno.
cdef int note_vmas(capture_t *capture) noexcept nogil
# The mapping that holds `addr`, or else the next one: from the table, or from the kernel if there is no
# table. 0, ENOENT, or errno.
cdef int vma_at(capture_t *capture, uint64_t addr, vma_t *found) noexcept nogil
