from libc.stdint cimport uint64_t

from snapengine.session cimport capture_t, lane_t

# Thread bodies; the argument is a lane_t.
cdef void *fault_thread(void *arg) noexcept nogil
cdef void *warden_thread(void *arg) noexcept nogil
# Answer missing faults that wait, and only those: for the walk while it waits for the fault threads.
cdef void answer_missing(capture_t *capture, lane_t *lane) noexcept nogil
# Serve the faults that the lane holds back.
cdef void serve_held(capture_t *capture, lane_t *lane) noexcept nogil
