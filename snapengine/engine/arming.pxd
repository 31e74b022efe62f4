from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

# Register and protect all regions, fix T, find the populated pages. 0, or 1: the capture has failed.
cdef int arm(capture_t *capture, lane_t *lane) noexcept nogil
# UFFDIO_REGISTER for one region, in the mode that write tracking or dirty logging needs. 0, or an errno: the
# capture has failed.
cdef int register_region(capture_t *capture, region_t *region) noexcept nogil
# The same for a region of an attached process, parts of which may have been unmapped. A mapping that has
# grown by mremap() since it was listed, or was merged with a new neighbour, is registered whole: if it were
# registered in part, it would be split, and a later mremap() across the edge would fail. The growth is
# neither protected nor saved; a missing page in it is filled when it is touched. 0 or errno.
cdef int register_attached(capture_t *capture, region_t *region, uint64_t mode) noexcept nogil
