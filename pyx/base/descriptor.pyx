"""Descriptors that are never lost: each belongs to an object from within the call of C that made it.

The handler of a signal may raise between the return of ``os.open`` and the next statement. Then nobody
knows the number, and the file stays open, with the lock that it may have. A `Descriptor` is closed by
`close`, at the end of a ``with`` block, or when the object is freed. One thread at a time.
"""

from libc.errno cimport errno
from posix.fcntl cimport F_DUPFD_CLOEXEC, O_CLOEXEC, fcntl
from posix.fcntl cimport open as c_open
from posix.unistd cimport close as c_close

from snapengine.base.oserror cimport raise_oserror

import os

cdef extern from "<fcntl.h>" nogil:
    int pipe2(int *ends, int flags)

cdef extern from "<sys/mman.h>" nogil:
    int memfd_create(const char *name, unsigned flags)
    const unsigned MFD_CLOEXEC

cdef extern from "<sys/syscall.h>" nogil:
    const long SYS_pidfd_open

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)


cdef class Descriptor:
    """open(2) with O_CLOEXEC. `fd`: its number, still there after `close`. Raises OSError.

    The static methods make one by other calls; each of them sets close-on-exec.
    """

    cdef readonly int fd
    cdef bint is_open               # False at first: an exception may come before `fd` is anything but 0

    def __init__(self, path not None, int flags, int mode=0o600):
        cdef bytes name = os.fsencode(path)
        cdef int fd
        self.close()
        fd = c_open(name, flags | O_CLOEXEC, mode)
        if fd < 0:
            raise OSError(errno, os.strerror(errno), path)
        self.own(fd)

    @staticmethod
    def duplicate(int fd):
        """Another descriptor of the same open file."""
        cdef Descriptor made = Descriptor.__new__(Descriptor)
        made.take(fcntl(fd, F_DUPFD_CLOEXEC, 0), b"dup")
        return made

    @staticmethod
    def memfd(bytes name not None):
        """A new file in memory (memfd_create)."""
        cdef Descriptor made = Descriptor.__new__(Descriptor)
        made.take(memfd_create(name, MFD_CLOEXEC), b"memfd_create")
        return made

    @staticmethod
    def pidfd(int pid):
        """A process (pidfd_open)."""
        cdef Descriptor made = Descriptor.__new__(Descriptor)
        made.take(<int>syscall(SYS_pidfd_open, pid, 0), b"pidfd_open")
        return made

    @staticmethod
    def pipe():
        """Both ends of a new pipe: (to read from, to write to)."""
        cdef Descriptor reader = Descriptor.__new__(Descriptor)
        cdef Descriptor writer = Descriptor.__new__(Descriptor)
        cdef int[2] ends
        if pipe2(ends, O_CLOEXEC) < 0:
            raise_oserror(errno, b"pipe2")
        reader.own(ends[0])
        writer.own(ends[1])
        return reader, writer

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

    def detach(self):
        """Give it up: the number, which the caller closes from now on."""
        self.is_open = False
        return self.fd

    cdef void own(self, int fd) noexcept:
        self.fd = fd
        self.is_open = True

    cdef int take(self, int fd, const char *call) except -1:
        """Own what `call` has returned. Raises OSError if that is -1."""
        if fd < 0:
            raise_oserror(errno, call)
        self.own(fd)
        return 0
