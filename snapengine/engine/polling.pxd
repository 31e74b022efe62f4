from snapengine.engine.state cimport capture_t, lane_t

# First walker, between two windows: serve the waiting faults. The fault threads sleep until stop_polling().
# Does nothing for a while after a request to wake the fault threads: they serve then.
cdef void poll_faults(capture_t *capture, lane_t *lane) noexcept nogil
# First walker: leave the faults to the fault threads. Call this before any work that may take longer than one
# window. Idempotent.
cdef void stop_polling(capture_t *capture) noexcept nogil
# Watchdog: wake the fault threads if the first walker's poll is overdue.
cdef void wake_if_overdue(capture_t *capture) noexcept nogil
