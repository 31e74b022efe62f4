from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

# Register and protect everything, fix T, note what is populated. 0, or 1: the capture has failed.
cdef int arm(capture_t *capture, lane_t *lane) noexcept nogil
# UFFDIO_REGISTER for one region, as the method wants it. 0, or an errno: the capture has failed.
cdef int register_region(capture_t *capture, region_t *region) noexcept nogil
# The same for an attached process, of which parts may be unmapped by now. What has grown by mremap(), or was
# merged with a new neighbour, since it was listed is registered whole: in two, a later mremap() over
# the edge would fail. Nothing there is protected or saved; a missing page is filled when it is touched.
cdef int register_attached(capture_t *capture, region_t *region, uint64_t mode) noexcept nogil
