"""Sources of image bytes: random-access reads without the GIL.

`Source` is the base class. C code reads through its `source_t`: one indirect call per read, no Python. A
source in Python, such as one for an object store, is a subclass with a `pread`; each read takes the GIL.

Ownership: a source owns its descriptor or exported buffer until `close`. An image takes over the source that
it is opened from, and `Image.close` closes it. The index and the restorers of the image hold references to
the source, so the struct that they read through stays valid. After `close` every read returns EBADF.

Threads: any number may read at once. No thread may read during `close`.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EBADF, EFAULT, EIO, errno
from libc.stdint cimport uint32_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.stat cimport S_ISDIR, S_ISREG, fstat, struct_stat

from snapengine.base.checksum cimport crc32c
from snapengine.base.fileio cimport pread_all
from snapengine.base.nofault cimport (
    guard_begin, guard_end, guard_thread, guarded, guarded_crc, guarded_store,
)
from snapengine.base.oserror cimport raise_oserror

import os
from errno import EISDIR

from snapengine.base.descriptor import Descriptor
from snapengine.errors import ImageError, TruncatedImageError

cdef enum:
    ENDS_EARLY = -1
    PIECE_BYTES = 256 << 10     # read at once for a checksum: fits the L2 cache


cdef int read_by_python(void *self, void *into, size_t count, uint64_t offset) noexcept with gil:
    cdef Source source = <Source>self
    cdef const unsigned char[::1] part
    cdef const char *data
    cdef char *to = <char *>into
    cdef size_t done
    cdef int err = 0
    guard_begin()
    try:
        while count and not err:
            part = source.pread(count, offset)
            done = <size_t>part.shape[0]
            if done == 0:
                return ENDS_EARLY
            if done > count:
                raise ValueError(f"{source.name}: pread returned {done} bytes where {count} were asked for")
            data = <const char *>&part[0]
            with nogil:
                guard_thread()
                err = guarded_store(to, data, done)
            to += done
            offset += done
            count -= done
        return err
    except BaseException as error:
        source.error = error
        return EIO
    finally:
        guard_end()


cdef int read_file(void *self, void *into, size_t count, uint64_t offset) noexcept nogil:
    return pread_all((<int *>self)[0], into, count, offset)


cdef struct copy_t:
    void *into
    const char *data
    size_t count


cdef int copy_bytes(void *arg) noexcept nogil:
    cdef copy_t *copy = <copy_t *>arg
    memcpy(copy.into, copy.data, copy.count)
    return 0


cdef int read_memory(void *self, void *into, size_t count, uint64_t offset) noexcept nogil:
    """Both sides may fault: the destination is the caller's, the source may be a truncated mapping."""
    cdef const memory_t *memory = <const memory_t *>self
    cdef uint32_t crc = 0
    cdef copy_t copy
    cdef int err = 0
    if not memory.is_open:
        return EBADF
    if offset > memory.length or count > memory.length - offset:
        return ENDS_EARLY
    if count == 0:                  # the address of an empty object may be NULL
        return 0
    copy.into = into
    copy.data = memory.data + offset
    copy.count = count
    guard_begin()
    guard_thread()
    if guarded(copy_bytes, &copy, 0, <uintptr_t>-1):
        err = EIO if guarded_crc(&crc, copy.data, count) else EFAULT
    guard_end()
    return err


cdef class Source:
    """Bytes that can be read at any offset. `name` is used in messages; `size` is in bytes, as of opening.

    A subclass in Python calls ``super().__init__(name, size)`` and defines `pread`.
    """

    def __cinit__(self, *arguments, **named):
        self.at.read = read_by_python
        self.at.self = <void *>self

    def __init__(self, str name not None, uint64_t size):
        self.name = name
        self.at.size = size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def size(self):
        """Size in bytes when the source was opened."""
        return self.at.size

    def pread(self, count, offset):
        """Return at most `count` bytes from `offset` as a bytes-like object; at least one, unless at the end.

        Its exceptions propagate to the reader of the image.
        """
        raise NotImplementedError("a subclass of Source must define pread(count, offset)")

    def read_exactly(self, offset, count):
        """Return exactly `count` bytes at `offset`. Raises `TruncatedImageError` before any allocation."""
        if offset + count > self.at.size:
            text = f"{self.name}: ends at byte {self.at.size}, inside a record"
            raise TruncatedImageError(text, offset)
        cdef uint64_t start = offset
        cdef size_t length = count
        cdef bytes data = PyBytes_FromStringAndSize(NULL, count)
        cdef char *into = PyBytes_AS_STRING(data)
        cdef int err
        with nogil:
            err = source_read(&self.at, into, length, start)
        if err:
            self.failed(err, start)
        return data

    def checksum(self, uint64_t offset, uint64_t count):
        """CRC-32C of `count` bytes at `offset`, or None if the source ends earlier. Raises OSError."""
        cdef char *scratch
        cdef size_t length
        cdef uint32_t crc = 0
        cdef int err = 0
        if offset > self.at.size or count > self.at.size - offset:
            return None
        scratch = <char *>malloc(PIECE_BYTES)
        if scratch == NULL:
            raise MemoryError
        with nogil:
            while count and not err:
                length = min(count, <uint64_t>PIECE_BYTES)
                err = source_read(&self.at, scratch, length, offset)
                if not err:
                    crc = crc32c(crc, scratch, length)
                offset += length
                count -= length
        free(scratch)
        if err > 0:
            self.failed(err, offset)
        return None if err else crc

    def close(self):
        """Release the underlying object. Idempotent; no other thread may be reading."""

    cdef int failed(self, int err, uint64_t offset) except -1 with gil:
        error, self.error = self.error, None
        if error is not None:
            raise error
        if err > 0:
            raise_oserror(err, b"read")
        raise TruncatedImageError(f"{self.name}: was truncated while it was read", offset)


cdef class FileSource(Source):
    """A regular file, from a path or from a descriptor, which is duplicated and remains the caller's.

    Owns the descriptor `fd`. Raises OSError if it cannot be opened, `ImageError` if it is not a regular file.
    """

    def __cinit__(self, *arguments, **named):
        self.fd = -1
        self.at.read = read_file
        self.at.self = &self.fd

    def __init__(self, file not None, str name=None):
        cdef struct_stat status
        self.close()
        if isinstance(file, int):
            self.descriptor = Descriptor.duplicate(file)
            self.name = name or f"fd:{file}"
        else:  # O_NONBLOCK: opening a FIFO must not block
            self.descriptor = Descriptor(file, os.O_RDONLY | os.O_NONBLOCK)
            self.name = name or os.fsdecode(file)
        self.fd = self.descriptor.fd
        try:
            if fstat(self.fd, &status) < 0:
                raise_oserror(errno, b"fstat")
            if S_ISDIR(status.st_mode):
                raise IsADirectoryError(EISDIR, "is a directory, not an image", self.name)
            if not S_ISREG(status.st_mode):
                raise ImageError(f"{self.name}: not a regular file; read a pipe with stream_image")
        except BaseException:
            self.close()
            raise
        self.at.size = <uint64_t>status.st_size

    def close(self):
        """Close the descriptor. Idempotent; no other thread may be reading."""
        self.fd = -1
        if self.descriptor is not None:
            self.descriptor.close()


cdef class MemorySource(Source):
    """A bytes-like object. Its buffer is exported while the source is open, so it can be neither resized nor
    closed. A read of memory that is gone (a mapping of a truncated file) fails with EIO."""

    def __cinit__(self, *arguments, **named):
        self.at.read = read_memory
        self.at.self = &self.memory

    def __init__(self, data not None, str name not None="memory"):
        self.close()
        PyObject_GetBuffer(data, &self.view, PyBUF_SIMPLE)
        self.name = name
        self.memory.data = <const char *>self.view.buf
        self.memory.length = self.at.size = <uint64_t>self.view.len
        self.memory.is_open = True

    def __dealloc__(self):
        if self.memory.is_open:
            PyBuffer_Release(&self.view)

    def close(self):
        """Release the buffer. Idempotent; no other thread may be reading."""
        if self.memory.is_open:
            self.memory.is_open = False
            PyBuffer_Release(&self.view)
