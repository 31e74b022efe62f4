"""A file opened for the length of a `with` block, and closed whatever comes.

The handler of a signal may raise between the return of os.open() and the statement behind it: then nobody
knows the number, and what is open stays open, with the lock that it may have. This object has it from
within one call of C, and closes it when it goes.
"""

from posix.fcntl cimport O_CLOEXEC
from posix.fcntl cimport open as c_open
from posix.unistd cimport close as c_close

from libc.errno cimport errno

import os


cdef class Descriptor:
    """open(2) with O_CLOEXEC. `fd`: its number. Raises OSError."""

    cdef readonly int fd
    cdef bint is_open               # False at first: an exception may come before `fd` is anything but 0

    def __cinit__(self, path not None, int flags):
        cdef bytes name = os.fsencode(path)
        self.fd = c_open(name, flags | O_CLOEXEC)
        if self.fd < 0:
            raise OSError(errno, os.strerror(errno), path)
        self.is_open = True

    def __enter__(self):
        """The number."""
        return self.fd

    def __exit__(self, kind, error, traceback):
        self.close()

    def __dealloc__(self):
        self.close()

    cpdef void close(self) noexcept:
        """Close it (idempotent)."""
        if self.is_open:
            self.is_open = False
            c_close(self.fd)
