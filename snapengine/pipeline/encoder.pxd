from libc.stdint cimport uint16_t, uint32_t, uint64_t

from snapengine.base.arena cimport Arena
from snapengine.pipeline.pool cimport Pool, chunk_ref, pool_t
from snapengine.base.pthreads cimport pthread_cond_t, pthread_mutex_t
from snapengine.image.writer cimport Writer

cdef enum:
    ENCODERS_MAX = 64

cdef enum:                          # when a chunk that would shrink may be stored raw
    RAW_NEVER
    RAW_FOR_WRITERS                 # while writers fault, and the walk waits for room
    RAW_FOR_ROOM                    # while anybody waits for room


cdef struct turn_t:
    # Whose turn it is to write, so that chunks reach the sink in the order they were filled.
    pthread_mutex_t lock
    pthread_cond_t changed
    uint64_t next                   # ticket; under `lock`
    uint64_t broken                 # an encoder failed; under `lock`
    # Estimates in ns per byte of data; written by any encoder, read as hints.
    double compress_cost
    double sink_cost
    double ratio
    # Under `lock`: whether writers fault so often that it matters, and since when that is counted.
    bint writers_fault              # read without the lock, as a hint
    uint64_t urgent_seen
    uint64_t seen_ns


cdef class Encoder:
    # From filled slots to the writer: compress, checksum, write. run() is one thread's body.
    cdef Pool pool
    cdef readonly Writer writer
    cdef bint compressing
    cdef int store_raw
    cdef int threads
    cdef Arena control
    cdef Arena memory
    cdef char *scratch[ENCODERS_MAX]      # one slot per thread, for spilled chunks
    cdef int fixed_level
    cdef object levels                    # None: `fixed_level` for all chunks
    cdef list compressors                 # per thread: {level: compressor}
    cdef list packed                      # each thread's last frame
    cdef turn_t *turn
    cdef readonly uint64_t raw_chunks
    cdef readonly uint64_t compressed_chunks

    cdef object _compressor(self, int number, level)
    cdef void _look_at_faults(self) noexcept nogil
    cdef bint _worth_it(self, uint64_t ticket) noexcept nogil
    cdef uint64_t _pack(self, int number, const char *data, uint64_t length, const char **frame) except? 0
    cdef bytes _probe(self, int number, level, view, bytes packed, double cost)
    cdef int _load(self, const chunk_ref *chunk, int number, char **data, uint64_t **entries) except -1 nogil
    cdef int _write(self, const uint64_t *entries, const chunk_ref *chunk, const char *payload,
                    uint64_t stored, uint16_t encoding, uint32_t crc) except -1 nogil
    cdef int _encode(self, const chunk_ref *chunk, uint64_t ticket, int number) except -1 nogil
    cdef int _loop(self, int number) except -1 nogil
