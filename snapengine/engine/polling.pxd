from snapengine.engine.state cimport capture_t, lane_t

# The first walker, between two windows: serve the faults that wait; until stop_polling() the fault threads
# sleep. Nothing, if they were called a moment ago: then they serve.
cdef void poll_faults(capture_t *capture, lane_t *lane) noexcept nogil
# Leave the faults to the fault threads: before anything that may take longer than one window. Idempotent.
cdef void stop_polling(capture_t *capture) noexcept nogil
# The warden: call the fault threads if the walker has not looked for long.
cdef void wake_if_overdue(capture_t *capture) noexcept nogil
