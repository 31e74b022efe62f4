"""File descriptors that cannot leak: an object owns each descriptor from within the C call that creates it.

A signal handler may raise between the return of ``os.open`` and the next statement. The descriptor is then
lost: the file stays open, and so does a lock on it. A `Descriptor` is closed by `close`, at the end of a
``with`` block, or when the object is freed. Not thread-safe.
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
    """open(2) with O_CLOEXEC. `fd` is the number, which remains readable after `close`. Raises OSError.

    The static methods create descriptors by other calls, all with close-on-exec.
    """

    cdef readonly int fd
    cdef bint is_open               # initially False: an exception may occur before `fd` is set

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
        """Duplicate a descriptor (fcntl, F_DUPFD_CLOEXEC)."""
        cdef Descriptor made = Descriptor.__new__(Descriptor)
        made.take(fcntl(fd, F_DUPFD_CLOEXEC, 0), b"dup")
        return made

    @staticmethod
    def memfd(bytes name not None):
        """Create a memory file (memfd_create)."""
        cdef Descriptor made = Descriptor.__new__(Descriptor)
        made.take(memfd_create(name, MFD_CLOEXEC), b"memfd_create")
        return made

    @staticmethod
    def pidfd(int pid):
        """Open a process (pidfd_open)."""
        cdef Descriptor made = Descriptor.__new__(Descriptor)
        made.take(<int>syscall(SYS_pidfd_open, pid, 0), b"pidfd_open")
        return made

    @staticmethod
    def pipe():
        """Create a pipe (pipe2). Returns (read end, write end)."""
        cdef Descriptor reader = Descriptor.__new__(Descriptor)
        cdef Descriptor writer = Descriptor.__new__(Descriptor)
        cdef int[2] ends
        if pipe2(ends, O_CLOEXEC) < 0:
            raise_oserror(errno, b"pipe2")
        reader.own(ends[0])
        writer.own(ends[1])
        return reader, writer

    def __enter__(self):
        """Return the descriptor number."""
        return self.fd

    def __exit__(self, kind, error, traceback):
        self.close()

    def __dealloc__(self):
        self.close()

    cpdef void close(self) noexcept:
        """Close the descriptor. Idempotent."""
        if self.is_open:
            self.is_open = False
            c_close(self.fd)

    def detach(self):
        """Release ownership: return the number, which the caller must close."""
        self.is_open = False
        return self.fd

    cdef void own(self, int fd) noexcept:
        self.fd = fd
        self.is_open = True

    cdef int take(self, int fd, const char *call) except -1:
        """Take ownership of the result of `call`. Raises OSError if it is -1."""
        if fd < 0:
            raise_oserror(errno, call)
        self.own(fd)
        return 0
