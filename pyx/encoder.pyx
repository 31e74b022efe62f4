"""Encoders: filled slots become chunks of the image, in the order they were filled.

Each thread takes a chunk, compresses it (zstandard needs the GIL for a moment per chunk and gives it
back while it works), and waits for its turn to write. Without compression nothing here needs the GIL.
No capture thread ever waits for an encoder, except the walk, for room in the pool.

Adaptive: a chunk is stored raw if it does not shrink, or if the walk is waiting for room and, by the
costs measured so far, raw bytes would leave faster than compressed ones. So compression never makes a
capture longer than storing raw would.
"""

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint16_t, uint32_t, uint64_t

import os

import zstandard

from snapengine.atomics cimport snap_load
from snapengine.checksum cimport crc32c
from snapengine.image_format cimport SNAP_RAW, SNAP_ZSTD
from snapengine.pool cimport (
    NO_SLOT, Pool, chunk_ref, pool_give_back, pool_take, pool_unspill, slot_data, slot_entries,
)
from snapengine.pthreads cimport (
    pthread_cond_broadcast, pthread_cond_init, pthread_cond_wait, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, snap_now_ns,
)

cdef double KEEP = 0.9              # of the old estimate, for each new chunk
cdef uint64_t PROBE = 16            # while raw is better, still compress every so many chunks to measure


cdef bint _await_turn(turn_t *turn, uint64_t ticket) noexcept nogil:
    """Holds the lock on return; False if another writer failed."""
    pthread_mutex_lock(&turn.lock)
    while turn.next != ticket and not turn.broken:
        pthread_cond_wait(&turn.changed, &turn.lock)
    return not turn.broken


cdef void _end_turn(turn_t *turn, bint broken) noexcept nogil:
    turn.next += 1
    turn.broken = turn.broken or broken
    pthread_cond_broadcast(&turn.changed)
    pthread_mutex_unlock(&turn.lock)


cdef double _mixed(double old, double new) noexcept nogil:
    return new if old == 0 else KEEP * old + (1 - KEEP) * new


cdef class Encoder:
    """The encoder side of one capture; `run` is the body of each of `threads` threads."""

    def __init__(self, Pool pool not None, Writer writer not None, level, int threads):
        self.pool = pool
        self.writer = writer
        self.level = level
        self.threads = threads
        self.control = Arena(sizeof(turn_t))
        self.control.touch()
        self.turn = <turn_t *>self.control.base
        pthread_mutex_init(&self.turn.lock, NULL)
        pthread_cond_init(&self.turn.changed, NULL)
        self.scratch = [Arena(pool.pool.stride) for _ in range(threads)]

    @property
    def scratch_bytes(self):
        """Bytes that the encoders hold beside the pool."""
        return self.threads * self.pool.pool.stride * (2 if self.level is not None else 1)

    cdef bint _worth_it(self, uint64_t ticket) noexcept nogil:
        cdef double zstd_cost, raw_cost
        if not snap_load(&self.pool.pool.starved) or self.turn.sink_cost == 0 or ticket % PROBE == 0:
            return True
        raw_cost = self.turn.sink_cost
        zstd_cost = max(self.turn.compress_cost / self.threads, self.turn.sink_cost * self.turn.ratio)
        return zstd_cost <= raw_cost

    def run(self, int number):
        """Encode and write until the queue is closed and empty. Raises what the sink raises; returns early
        and silently if another thread of the capture failed."""
        cdef pool_t *pool = self.pool.pool
        cdef Arena scratch = self.scratch[number]
        cdef chunk_ref chunk
        cdef uint64_t ticket, stored, begin
        cdef char *data
        cdef uint64_t *entries
        cdef const char *payload
        cdef uint16_t encoding
        cdef uint32_t crc
        cdef int status, err
        cdef bint mine
        compressor = None if self.level is None else zstandard.ZstdCompressor(
            level=self.level, write_checksum=False, write_content_size=True)
        while True:
            with nogil:
                status = pool_take(pool, &chunk, &ticket)
            if status <= 0:
                return
            err = 0
            if chunk.slot == NO_SLOT:
                data = scratch.base
                entries = <uint64_t *>(scratch.base + pool.slot_bytes)
                with nogil:
                    err = pool_unspill(pool, &chunk, data, entries)
            else:
                data = slot_data(pool, chunk.slot)
                entries = slot_entries(pool, chunk.slot)
            payload = data
            stored = chunk.data_bytes
            encoding = SNAP_RAW
            packed = None
            if not err and compressor is not None and stored and self._worth_it(ticket):
                begin = snap_now_ns()
                packed = compressor.compress(PyMemoryView_FromMemory(data, stored, PyBUF_READ))
                self.turn.compress_cost = _mixed(self.turn.compress_cost,
                                                 (snap_now_ns() - begin) / <double>stored)
                self.turn.ratio = _mixed(self.turn.ratio, len(packed) / <double>stored)
                if <uint64_t>len(packed) < stored - stored // 16:
                    payload = <const char *><bytes>packed
                    stored = len(packed)
                    encoding = SNAP_ZSTD
            with nogil:
                crc = crc32c(0, payload, stored)
                mine = _await_turn(self.turn, ticket)
            try:
                if err:
                    raise OSError(err, f"spill file: {os.strerror(err)}")
                if mine:
                    begin = snap_now_ns()
                    with nogil:
                        self.writer.chunk(entries, chunk.n_entries, payload, stored, chunk.data_bytes,
                                          encoding, crc)
                    if stored:
                        self.turn.sink_cost = _mixed(self.turn.sink_cost,
                                                     (snap_now_ns() - begin) / <double>stored)
                    if encoding == SNAP_RAW:
                        self.raw_chunks += 1
                    else:
                        self.compressed_chunks += 1
            except BaseException:
                _end_turn(self.turn, True)
                raise
            _end_turn(self.turn, False)
            if chunk.slot != NO_SLOT:
                with nogil:
                    pool_give_back(pool, chunk.slot)
            if not mine:
                return
