# Thread body; the argument is a lane_t.
cdef void *warden_thread(void *arg) noexcept nogil
