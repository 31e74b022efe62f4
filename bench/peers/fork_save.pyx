# cython: cdivision=True
"""Save by fork and copy-on-write, as Redis does: the child writes the memory and exits.

Not shipped (setup_floors.py).
"""

from libc.errno cimport EIO, errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy
from posix.types cimport pid_t
from posix.unistd cimport _exit, fork, pwrite
from posix.wait cimport WEXITSTATUS, WIFEXITED, waitpid

from snapengine.base.oserror cimport raise_oserror

cdef enum:
    WRITE_BYTES = 1 << 18             # fits into the second-level cache together with its copy

cdef char[WRITE_BYTES] copy


cdef int write_all(int sink, uint64_t addr, uint64_t length) noexcept nogil:
    """Runs in the child of a multithreaded program: system calls only. Returns an errno value."""
    cdef uint64_t at = 0
    cdef size_t size
    cdef ssize_t done
    while at < length:
        size = min(length - at, <uint64_t>WRITE_BYTES)
        done = size
        if sink < 0:
            memcpy(copy, <const void *><uintptr_t>(addr + at), size)
        else:
            done = pwrite(sink, <const void *><uintptr_t>(addr + at), size, at)
        if done <= 0:
            return errno if done < 0 else EIO
        at += done
    return 0


def start(int sink, uint64_t addr, uint64_t length):
    """Fork a child that writes the memory into `sink` (negative: only copies it) and exits.

    Returns its process id, for `finish`. Raises OSError.
    """
    cdef pid_t child
    with nogil:
        child = fork()
        if child == 0:
            _exit(write_all(sink, addr, length))
    if child < 0:
        raise_oserror(errno, b"fork")
    return child


def finish(pid_t child):
    """Wait for the child. Raises OSError if it failed."""
    cdef int status = 0, err = 0
    with nogil:
        if waitpid(child, &status, 0) != child:
            err = errno
    if not err:
        err = WEXITSTATUS(status) if WIFEXITED(status) else EIO
    if err:
        raise_oserror(err, b"fork and copy-on-write")
