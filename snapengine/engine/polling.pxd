from snapengine.engine.session cimport capture_t, lane_t

# The first walker, between two windows: serve the faults that wait; until stop_looking() the fault threads
# sleep. Nothing, if they were called a moment ago: then they serve.
cdef void look(capture_t *capture, lane_t *lane) noexcept nogil
# Leave the faults to the fault threads: before anything that may take longer than one window. Idempotent.
cdef void stop_looking(capture_t *capture) noexcept nogil
# The warden: call the fault threads if the walker has not looked for long.
cdef void call_if_overdue(capture_t *capture) noexcept nogil
