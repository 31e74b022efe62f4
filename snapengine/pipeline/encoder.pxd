from libc.stdint cimport uint16_t, uint32_t, uint64_t

from snapengine.base.arena cimport Arena
from snapengine.pipeline.pool cimport Pool, chunk_ref, pool_t
from snapengine.base.pthreads cimport pthread_cond_t, pthread_mutex_t
from snapengine.image.writer cimport Writer

cdef enum:
    ENCODERS_MAX = 64

cdef enum:                          # when a compressible chunk may be stored raw
    RAW_NEVER
    RAW_FOR_WRITERS                 # while writers fault and the walk waits for a slot
    RAW_FOR_ROOM                    # while any thread waits for a slot


cdef struct turn_t:
    # Serializes writes by ticket, so that chunks reach the sink in the order in which they were filled.
    pthread_mutex_t lock
    pthread_cond_t changed
    uint64_t next                   # ticket; under `lock`
    uint64_t broken                 # an encoder failed; under `lock`
    # Moving averages, written by any encoder and read as hints: costs in ns per byte, compression ratio.
    double compress_cost
    double sink_cost
    double ratio
    # Under `lock`: the rate of served faults.
    bint writers_fault              # the rate exceeds the threshold; read without the lock, as a hint
    uint64_t faults_seen            # faults served at the last sample
    uint64_t sampled_ns             # time of the last sample


cdef class Encoder:
    # Compresses, checksums and writes filled slots. run() is the body of one thread.
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
    cdef list frames                      # last zstd frame of each thread
    cdef turn_t *turn
    cdef readonly uint64_t raw_chunks
    cdef readonly uint64_t compressed_chunks

    cdef object _compressor(self, int number, level)
    cdef void _sample_faults(self) noexcept nogil
    cdef bint _should_compress(self, uint64_t ticket) noexcept nogil
    cdef uint64_t _compress(self, int number, const char *data, uint64_t length, const char **frame) except? 0
    cdef bytes _probe_next_level(self, int number, level, view, bytes packed, double cost)
    cdef int _load(self, const chunk_ref *chunk, int number, char **data, uint64_t **entries) except -1 nogil
    cdef int _write(self, const uint64_t *entries, const chunk_ref *chunk, const char *payload,
                    uint64_t stored, uint16_t encoding, uint32_t crc) except -1 nogil
    cdef int _encode(self, const chunk_ref *chunk, uint64_t ticket, int number) except -1 nogil
    cdef int _loop(self, int number) except -1 nogil
