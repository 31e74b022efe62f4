from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from snapengine.reader cimport PageIndex
from snapengine.runs cimport Runs, run_t


cdef class Restorer:
    # Moves the bytes [low, high) of an image, laid out by page number, to one destination.
    cdef PageIndex index
    cdef Runs live            # DATA runs only, by chunk and place in its payload
    cdef Runs blank           # ZERO and HOLE runs, by page
    cdef uint64_t low
    cdef uint64_t high
    cdef size_t *starts       # starts[j] ... starts[j + 1]: the runs of job j, all of one chunk
    cdef readonly size_t jobs

    cdef int plan(self, Runs runs) except -1
    # One chunk: read, verify, place. `to` is memory for `low`; or NULL, then `to_fd` gets it at `to_offset`.
    cdef int job(self, size_t number, char *to, int to_fd, uint64_t to_offset, char *scratch) except -1 nogil
    cdef int place(self, size_t number, const char *payload, char *to, int to_fd,
                   uint64_t to_offset) except -1 nogil
    cdef int place_zstd(self, size_t number, const char *frame, char *to, int to_fd,
                        uint64_t to_offset) except -1 with gil
    cdef int read_failed(self, int err, uint64_t offset) except -1 with gil
    cdef int damaged(self, uint64_t offset) except -1 with gil
