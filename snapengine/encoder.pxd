from libc.stdint cimport uint64_t

from snapengine.arena cimport Arena
from snapengine.pool cimport Pool, pool_t
from snapengine.pthreads cimport pthread_cond_t, pthread_mutex_t
from snapengine.writer cimport Writer


cdef struct turn_t:
    # Whose turn it is to write, so that chunks reach the sink in the order they were filled.
    pthread_mutex_t lock
    pthread_cond_t changed
    uint64_t next                   # ticket; under `lock`
    uint64_t broken                 # a writer failed; under `lock`
    # Estimates in ns per byte of data, by the thread whose turn it is; others read them whole.
    double compress_cost
    double sink_cost
    double ratio


cdef class Encoder:
    # From filled slots to the writer: compress, checksum, write. run() is one thread's body.
    cdef Pool pool
    cdef readonly Writer writer
    cdef object level
    cdef int threads
    cdef Arena control
    cdef list scratch
    cdef turn_t *turn
    cdef readonly uint64_t raw_chunks
    cdef readonly uint64_t compressed_chunks
    cdef bint _worth_it(self, uint64_t ticket) noexcept nogil
