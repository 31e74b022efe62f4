"""Complete pread and pwrite without the GIL. Any thread; owns nothing."""

from libc.errno cimport EINTR, errno
from posix.unistd cimport pread, pwrite

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


cdef uint64_t file_size(int fd) noexcept nogil:
    cdef struct_stat status
    return <uint64_t>status.st_size if fstat(fd, &status) == 0 else 0


def file_system(path):
    """(type, block size in bytes) of the file system of a path (statfs(2)). Raises OSError."""
    cdef struct_statfs found
    cdef bytes name = os.fsencode(path)
    cdef const char *chars = name
    cdef int err
    with nogil:
        err = 0 if statfs(chars, &found) == 0 else errno
    if err:
        raise_oserror(err, b"statfs")
    return found.f_type, found.f_bsize
