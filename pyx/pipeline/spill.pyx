"""The spill file: slots that found no room in the queue's memory, on disk until an encoder comes to them.

Each place holds one slot, the page map behind the data. Capture threads write, encoders read; a place has one
of each, and goes through the queue.
"""

from libc.errno cimport EINTR, EIO, errno
from libc.stdint cimport uint64_t
from posix.unistd cimport pread, pwrite

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, long offset, long length)
    const int FALLOC_FL_PUNCH_HOLE
    const int FALLOC_FL_KEEP_SIZE


cdef int _pwrite_all(int fd, const char *data, uint64_t length, uint64_t offset) noexcept nogil:
    cdef ssize_t put
    while length:
        put = pwrite(fd, data, length, offset)
        if put < 0:
            if errno == EINTR:
                continue
            return errno
        data += put
        offset += put
        length -= put
    return 0


cdef int _pread_all(int fd, char *data, uint64_t length, uint64_t offset) noexcept nogil:
    cdef ssize_t got
    while length:
        got = pread(fd, data, length, offset)
        if got < 0:
            if errno == EINTR:
                continue
            return errno
        if got == 0:
            return EIO
        data += got
        offset += got
        length -= got
    return 0


cdef int spill_put(pool_t *pool, const lane_slot *lane, uint64_t offset) noexcept nogil:
    cdef int err = _pwrite_all(pool.spill_fd, lane.data, lane.used, offset)
    if err:
        return err
    return _pwrite_all(pool.spill_fd, <char *>lane.entries, lane.n_entries * 8, offset + pool.slot_bytes)


cdef int spill_take(pool_t *pool, const chunk_ref *chunk, char *data, uint64_t *entries) noexcept nogil:
    cdef int err = _pread_all(pool.spill_fd, data, chunk.data_bytes, chunk.spill_offset)
    if not err:
        err = _pread_all(pool.spill_fd, <char *>entries, chunk.n_entries * 8,
                         chunk.spill_offset + pool.slot_bytes)
    if not err:
        # Gives the space back early; a file system without holes keeps it until the file is closed.
        fallocate(pool.spill_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  chunk.spill_offset, pool.stride)
    return err
