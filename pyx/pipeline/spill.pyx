"""The spill file: filled slots on disk, for when all slots in memory are in use.

Each extent holds one slot: its data, then its page map. One capture thread writes an extent and passes it
through the queue to one encoder, which reads it.
"""

from libc.errno cimport EIO
from libc.stdint cimport uint64_t

from snapengine.base.fileio cimport pread_all, pwrite_all

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long offset, long length)
    const int FALLOC_FL_PUNCH_HOLE
    const int FALLOC_FL_KEEP_SIZE


cdef int spill_write(int fd, const spill_extent *at, const char *data,
                     const uint64_t *entries) noexcept nogil:
    cdef int err = pwrite_all(fd, data, at.data_bytes, at.offset)
    if err:
        return err
    return pwrite_all(fd, <const char *>entries, at.n_entries * 8, at.offset + at.entries_offset)


cdef int spill_read(int fd, const spill_extent *at, char *data, uint64_t *entries) noexcept nogil:
    cdef int err = pread_all(fd, data, at.data_bytes, at.offset)
    if not err:
        err = pread_all(fd, entries, at.n_entries * 8, at.offset + at.entries_offset)
    if err < 0:                             # early end of file
        err = EIO
    if not err:
        # Frees the space early. A file system without hole punching frees it when the file is closed.
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at.offset, at.bytes)
    return err
