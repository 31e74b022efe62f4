from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from snapengine.image.index cimport PageIndex
from snapengine.image.runs cimport Runs, run_t


cdef struct destination_t:
    char *memory              # address of byte `low`; NULL: the destination is a file
    int fd
    uint64_t offset           # file offset of byte `low`


cdef class Restorer:
    # Restores the bytes [low, high) of an image to one destination. Byte 4096 * p is the first of page p.
    cdef PageIndex index
    cdef Runs data_runs       # DATA runs, sorted by chunk and offset in its payload
    cdef Runs zero_runs       # ZERO and HOLE runs, sorted by page
    cdef uint64_t low
    cdef uint64_t high
    cdef size_t *starts       # job j: runs starts[j] up to starts[j + 1], all of one chunk
    cdef readonly size_t jobs

    cdef int plan(self, Runs runs) except -1
    # Reads, verifies and writes out one chunk.
    cdef int job(self, size_t number, const destination_t *into, char *scratch,
                 object decompressor) except -1 nogil
    cdef int copy_raw(self, size_t number, const destination_t *into, char *scratch) except -1 nogil
    cdef void skip_to(self, size_t *run, size_t number, uint64_t done) noexcept nogil
    cdef char *direct(self, size_t run, size_t number, uint64_t done, uint64_t count,
                      const destination_t *into) noexcept nogil
    cdef int decompress_chunk(self, size_t number, const destination_t *into, const char *frame,
                              object decompressor) except -1 with gil
    cdef int write_out(self, size_t run, size_t number, const char *data, uint64_t done, uint64_t count,
                       const destination_t *into) except -1 nogil
    cdef int buffer_fault(self) except -1 with gil
    cdef int read_failed(self, int err, uint64_t offset) except -1 with gil
    cdef int checksum_mismatch(self, uint64_t offset) except -1 with gil
