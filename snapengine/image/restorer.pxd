from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from snapengine.image.index cimport PageIndex
from snapengine.image.runs cimport Runs, run_t


cdef struct destination_t:
    char *memory              # of byte `low`; or NULL, then
    int fd                    # it lies in this file
    uint64_t offset           # at this offset


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
    # One chunk: read, verify, place.
    cdef int job(self, size_t number, const destination_t *into, char *scratch,
                 object decompressor) except -1 nogil
    cdef int copy_raw(self, size_t number, const destination_t *into, char *scratch) except -1 nogil
    cdef void skip_to(self, size_t *run, size_t number, uint64_t done) noexcept nogil
    cdef char *direct(self, size_t run, size_t number, uint64_t done, uint64_t count,
                      const destination_t *into) noexcept nogil
    cdef int unpack(self, size_t number, const destination_t *into, const char *frame,
                    object decompressor) except -1 with gil
    cdef int place(self, size_t run, size_t number, const char *data, uint64_t done, uint64_t count,
                   const destination_t *into) except -1 nogil
    cdef int no_memory(self) except -1 with gil
    cdef int read_failed(self, int err, uint64_t offset) except -1 with gil
    cdef int damaged(self, uint64_t offset) except -1 with gil
