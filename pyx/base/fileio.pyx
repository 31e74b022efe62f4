"""pread and pwrite to the last byte, without the GIL. Any thread; owns nothing."""

from libc.errno cimport EINTR, errno
from libc.stdlib cimport free, malloc
from posix.unistd cimport pread, pwrite

from snapengine.base.checksum cimport crc32c
from snapengine.base.oserror cimport raise_oserror

import os

cdef extern from "<sys/stat.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    struct struct_stat "stat":
        timespec st_mtim
        long st_size
    int fstat(int fd, struct_stat *status)


cdef extern from "<sys/vfs.h>" nogil:
    struct struct_statfs "statfs":
        long f_type
        long f_bsize
    int statfs(const char *path, struct_statfs *found)


cdef int pread_all(int fd, void *data, size_t count, uint64_t offset) noexcept nogil:
    cdef ssize_t done
    cdef char *into = <char *>data
    while count:
        done = pread(fd, into, count, offset)
        if done < 0 and errno == EINTR:
            continue
        if done <= 0:
            return errno if done < 0 else -1
        into += done
        offset += <uint64_t>done
        count -= <size_t>done
    return 0


cdef int pwrite_all(int fd, const char *data, size_t count, uint64_t offset) noexcept nogil:
    cdef ssize_t done
    while count:
        done = pwrite(fd, data, count, offset)
        if done < 0 and errno == EINTR:
            continue
        if done < 0:
            return errno
        data += done
        offset += <uint64_t>done
        count -= <size_t>done
    return 0


def crc_of_range(int fd, uint64_t offset, uint64_t length):
    """CRC-32C of `length` bytes of a file, without the GIL. None: the file ends before that."""
    cdef size_t room = min(length, <uint64_t>1 << 20)
    cdef char *scratch = <char *>malloc(room + 1)
    cdef uint32_t crc = 0
    cdef int err = 0
    cdef size_t count
    if scratch == NULL:
        raise MemoryError
    with nogil:
        while length and err == 0:
            count = min(length, <uint64_t>room)
            err = pread_all(fd, scratch, count, offset)
            crc = crc32c(crc, scratch, count)
            offset += count
            length -= count
    free(scratch)
    if err > 0:
        raise_oserror(err, b"pread")
    return None if err else crc


cdef uint64_t file_size(int fd) noexcept nogil:
    cdef struct_stat status
    return <uint64_t>status.st_size if fstat(fd, &status) == 0 else 0


def file_system(path):
    """(type, block size in bytes) of the file system that a path is on: statfs(2). Raises OSError."""
    cdef struct_statfs found
    cdef bytes name = os.fsencode(path)
    cdef const char *chars = name
    cdef int err
    with nogil:
        err = 0 if statfs(chars, &found) == 0 else errno
    if err:
        raise_oserror(err, b"statfs")
    return found.f_type, found.f_bsize
