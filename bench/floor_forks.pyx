# cython: cdivision=True, boundscheck=False, wraparound=False
"""Floor of fork and copy-on-write. Not shipped (setup_floors.py)."""

from array import array

from libc.errno cimport errno
from libc.stdint cimport uint64_t
from posix.types cimport pid_t
from posix.unistd cimport _exit, close, fork, pipe, read
from posix.wait cimport waitpid

from snapengine.base.oserror cimport raise_oserror
from snapengine.base.pthreads cimport snap_now_ns

cdef extern from *:
    ctypedef char volatile_char "volatile char"

cdef uint64_t PAGE = 4096


cdef pid_t fork_waiting(int *ends) noexcept nogil:
    """Fork a child that waits until the other end of the pipe is closed. It only does system calls."""
    cdef pid_t child = fork()
    cdef char byte
    if child == 0:
        close(ends[1])
        read(ends[0], &byte, 1)
        _exit(0)
    return child


def fork_and_write_ns(unsigned char[::1] memory not None):
    """(Nanoseconds of fork(), array of nanoseconds of the first write to each page while the child lives).

    fork() copies the page tables of the whole process, so nothing else that is large should be mapped.
    """
    cdef uint64_t count = memory.shape[0] // PAGE, i, began, forked
    cdef uint64_t[::1] taken
    cdef int[2] ends
    cdef pid_t child
    cdef int err = 0
    result = array("Q", bytes(8 * count))
    taken = result
    if pipe(ends):
        raise_oserror(errno, b"pipe")
    with nogil:
        began = snap_now_ns()
        child = fork_waiting(ends)
        forked = snap_now_ns() - began
        if child < 0:
            err = errno
        else:
            for i in range(count):
                began = snap_now_ns()
                (<volatile_char *>&memory[i * PAGE])[0] = 1
                taken[i] = snap_now_ns() - began
        close(ends[0])
        close(ends[1])
        if child > 0:
            waitpid(child, NULL, 0)
    if err:
        raise_oserror(err, b"fork")
    return forked, result
