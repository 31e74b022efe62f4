from snapengine.engine.state cimport capture_t, lane_t

# Claim the pages in which one region ends and another begins. Call this before any fault is served.
cdef void claim_shared_pages(capture_t *capture) noexcept nogil
# Save and release those pages. 0, or an errno: the capture has failed.
cdef int save_shared_pages(capture_t *capture, lane_t *lane) noexcept nogil
# Save units until none is left or the capture has failed. Any number of walkers may run it at the same time.
cdef void walk(capture_t *capture, lane_t *lane) noexcept nogil
