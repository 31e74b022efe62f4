"""An embedder in Cython: calls the C level of the installed package without the GIL."""

from libc.stdint cimport uint32_t

from snapengine.checksum cimport crc32c


def checksum(const unsigned char[::1] data not None):
    cdef uint32_t value
    with nogil:
        value = crc32c(0, &data[0], data.shape[0])
    return value
