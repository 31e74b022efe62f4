# extern-only: no matching .pyx. poll(2).
cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout_ms)
    const short POLLIN, POLLOUT
