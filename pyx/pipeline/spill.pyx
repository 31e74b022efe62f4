"""The spill file: slots that found no room in the queue's memory, on disk until an encoder comes to them.

Each place holds one slot, the page map behind the data. Capture threads write, encoders read; a place has one
of each, and goes through the queue.
"""

from libc.errno cimport EIO
from libc.stdint cimport uint64_t

from snapengine.base.fileio cimport pread_all, pwrite_all

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long offset, long length)
    const int FALLOC_FL_PUNCH_HOLE
    const int FALLOC_FL_KEEP_SIZE


cdef int spill_put(int fd, const spill_place *place, const char *data, const uint64_t *entries
                   ) noexcept nogil:
    cdef int err = pwrite_all(fd, data, place.data_bytes, place.offset)
    if err:
        return err
    return pwrite_all(fd, <const char *>entries, place.n_entries * 8, place.offset + place.entries_at)


cdef int spill_take(int fd, const spill_place *place, char *data, uint64_t *entries) noexcept nogil:
    cdef int err = pread_all(fd, data, place.data_bytes, place.offset)
    if not err:
        err = pread_all(fd, entries, place.n_entries * 8, place.offset + place.entries_at)
    if err < 0:                             # the file ends before that
        err = EIO
    if not err:
        # Gives the space back early; a file system without holes keeps it until the file is closed.
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, place.offset, place.bytes)
    return err
