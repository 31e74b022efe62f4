from snapengine.engine.state cimport capture_t, lane_t

# Begin to answer missing faults of the target, in a thread of its own. 0 or errno.
cdef int start_missing(capture_t *capture, lane_t *lane) noexcept nogil
# End it, and wait for it. Faults that come later wait until the memory is unregistered.
cdef void stop_missing(capture_t *capture, lane_t *lane) noexcept nogil
