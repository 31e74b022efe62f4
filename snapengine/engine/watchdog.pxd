# Thread body; the argument is a lane_t.
cdef void *watchdog_thread(void *arg) noexcept nogil
