"""Encoders write filled slots to the image as chunks, in the order in which the slots were filled.

Each thread takes a chunk, compresses it (zstandard needs the GIL briefly per chunk and releases it while it
compresses), and waits for its turn to write. Without compression the encoders need no GIL. No capture thread
waits for an encoder, except the walk, which waits for a free slot.

A chunk is stored raw if it does not shrink. It is also stored raw if compression delays a thread for which
the delay matters, and raw output is faster by the costs measured so far. A walk that waits for a slot delays
no other thread by itself: the pages that it has not reached are only protected. Its delay matters when
writers fault on these pages (a fault costs a writer 20 to 50 µs). It always matters when the duration of the
walk is the target's pause or the length of its next round.
"""

from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint16_t, uint32_t, uint64_t

import zstandard

from snapengine.pipeline.zstd_auto import Levels

from snapengine.base.atomics cimport snap_load
from snapengine.base.checksum cimport crc32c
from snapengine.image.format cimport SNAP_RAW, SNAP_ZSTD
from snapengine.base.oserror cimport raise_oserror
from snapengine.pipeline.pool cimport (
    NO_SLOT, Pool, chunk_ref, pool_give_back, pool_read_back, pool_take, slot_data, slot_entries,
)
from snapengine.base.pthreads cimport (
    LONG_SLICE_NS, pthread_cond_broadcast, pthread_cond_init, pthread_cond_wait, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_unlock, snap_nice_slice, snap_now_ns,
)

cdef double OLD_WEIGHT = 0.9        # of the moving averages: weight of the old value
# Without compression an encoder mostly sleeps, and threads that wait for its slot wait for the sink: it must
# not queue for a CPU behind the walkers. An encoder that compresses must not take the CPU from the target.
cdef int RAW_NICE = -10
cdef uint64_t PROBE_INTERVAL = 16   # while raw is faster, every 16th chunk is compressed to measure the cost
# Faults matter if they are more frequent than one per this interval, which costs writers 2 to 5 % of a CPU.
cdef uint64_t FAULT_INTERVAL_NS = 1_000_000
cdef uint64_t SAMPLE_NS = 5_000_000

_STORE_RAW = {"never": RAW_NEVER, "writers": RAW_FOR_WRITERS, "room": RAW_FOR_ROOM}


cdef bint _await_turn(turn_t *turn, uint64_t ticket) noexcept nogil:
    """Wait for the turn of `ticket`. Returns with the lock held; False if another encoder failed."""
    pthread_mutex_lock(&turn.lock)
    while turn.next != ticket and not turn.broken:
        pthread_cond_wait(&turn.changed, &turn.lock)
    return not turn.broken


cdef void _end_turn(turn_t *turn) noexcept nogil:
    turn.next += 1
    pthread_cond_broadcast(&turn.changed)
    pthread_mutex_unlock(&turn.lock)


cdef void _fail_turns(turn_t *turn, bint locked) noexcept nogil:
    if not locked:
        pthread_mutex_lock(&turn.lock)
    turn.broken = True
    pthread_cond_broadcast(&turn.changed)
    pthread_mutex_unlock(&turn.lock)


cdef double _moving_average(double old, double new) noexcept nogil:
    return new if old == 0 else OLD_WEIGHT * old + (1 - OLD_WEIGHT) * new


cdef class Encoder:
    """The encoders of one capture; `run` is the body of each of `threads` threads.

    `store_raw`: when a compressible chunk may be stored raw because that is faster. ``"never"``;
    ``"writers"``: while writers fault and the walk waits for a slot; ``"room"``: while any thread waits for a
    slot. `follow_sink`: choose the level by the measured costs of compression and sink.
    """

    def __init__(self, Pool pool not None, Writer writer not None, level, int threads, *,
                 str store_raw="writers", bint follow_sink=False):
        cdef int number
        self.pool = pool
        self.writer = writer
        self.compressing = level is not None
        self.store_raw = _STORE_RAW[store_raw]
        self.threads = threads
        self.control = Arena(sizeof(turn_t))
        self.control.touch()
        self.turn = <turn_t *>self.control.base
        pthread_mutex_init(&self.turn.lock, NULL)
        pthread_cond_init(&self.turn.changed, NULL)
        if not 1 <= threads <= ENCODERS_MAX:
            raise ValueError(f"encoder threads: {threads} is not in 1 ... {ENCODERS_MAX}")
        self.memory = Arena(threads * pool.pool.stride)
        for number in range(threads):
            self.scratch[number] = self.memory.base + number * pool.pool.stride
        self.frames = [b""] * threads
        self.fixed_level = level if self.compressing else 0
        self.levels = Levels(threads) if self.compressing and follow_sink else None
        self.compressors = [{} for _ in range(threads)]

    @property
    def scratch_bytes(self):
        """Bytes of memory that the encoders use in addition to the pool."""
        return self.threads * self.pool.pool.stride * (2 if self.compressing else 1)

    @property
    def level(self):
        """The zstd level of the next chunk; None without compression."""
        if not self.compressing:
            return None
        return self.fixed_level if self.levels is None else self.levels.level

    cdef object _compressor(self, int number, level):
        """The compressor of a thread and level, created on first use: each has tables of up to some MiB."""
        cdef dict mine = self.compressors[number]
        if level not in mine:
            mine[level] = zstandard.ZstdCompressor(level=level)
        return mine[level]

    cdef void _sample_faults(self) noexcept nogil:
        """Update `writers_fault`. Only the thread whose turn it is may call it."""
        cdef uint64_t now = snap_now_ns()
        cdef uint64_t served = snap_load(&self.pool.pool.faults_served)
        if now - self.turn.sampled_ns < SAMPLE_NS:
            return
        served -= self.turn.faults_seen
        self.turn.writers_fault = served * FAULT_INTERVAL_NS > now - self.turn.sampled_ns
        self.turn.faults_seen += served
        self.turn.sampled_ns = now

    cdef bint _should_compress(self, uint64_t ticket) noexcept nogil:
        cdef double zstd_cost, raw_cost
        if self.store_raw == RAW_NEVER or (self.store_raw == RAW_FOR_WRITERS and not self.turn.writers_fault):
            return True
        if not snap_load(&self.pool.pool.waiters) or self.turn.sink_cost == 0 or ticket % PROBE_INTERVAL == 0:
            return True
        raw_cost = self.turn.sink_cost
        zstd_cost = max(self.turn.compress_cost / self.threads, self.turn.sink_cost * self.turn.ratio)
        return zstd_cost <= raw_cost

    cdef uint64_t _compress(self, int number, const char *data, uint64_t length,
                            const char **frame) except? 0:
        """Compress into frames[number]. Returns the length of the frame, or 0 if it saves less than 1/16."""
        cdef uint64_t begin = snap_now_ns()
        cdef uint64_t stored
        cdef double cost
        level = self.level
        view = PyMemoryView_FromMemory(<char *>data, length, PyBUF_READ)
        packed = self._compressor(number, level).compress(view)
        stored = len(packed)
        cost = (snap_now_ns() - begin) / <double>length
        self.turn.compress_cost = _moving_average(self.turn.compress_cost, cost)
        self.turn.ratio = _moving_average(self.turn.ratio, stored / <double>length)
        if self.levels is not None:
            self.levels.note(level, cost, stored / <double>length, self.turn.sink_cost)
            packed = self._probe_next_level(number, level, view, packed, cost)
            stored = len(packed)
        self.frames[number] = packed            # keeps the frame alive until the next one of this thread
        frame[0] = PyBytes_AS_STRING(packed)
        return stored if stored < length - length // 16 else 0

    cdef bytes _probe_next_level(self, int number, level, view, bytes packed, double cost):
        """Compress the chunk also at the next level, if a probe is due. Returns the smaller frame."""
        cdef uint64_t begin = snap_now_ns()
        above = self.levels.probe(level)
        if above is None:
            return packed
        other = self._compressor(number, above).compress(view)
        taken = (snap_now_ns() - begin) / <double>len(view)
        self.levels.compare(above, taken / cost, len(other) / <double>len(packed))
        return min(other, packed, key=len)

    cdef int _load(self, const chunk_ref *chunk, int number, char **data, uint64_t **entries) except -1 nogil:
        """Store the addresses of the chunk's data and page map; read them back if they were spilled."""
        cdef pool_t *pool = self.pool.pool
        cdef int err
        if chunk.slot != NO_SLOT:
            data[0] = slot_data(pool, chunk.slot)
            entries[0] = slot_entries(pool, chunk.slot)
            return 0
        data[0] = self.scratch[number]
        entries[0] = <uint64_t *>(data[0] + pool.slot_bytes)
        err = pool_read_back(pool, chunk, data[0], entries[0])
        if err:
            raise_oserror(err, "spill file")
        return 0

    cdef int _write(self, const uint64_t *entries, const chunk_ref *chunk, const char *payload,
                    uint64_t stored, uint16_t encoding, uint32_t crc) except -1 nogil:
        """Write the chunk. Only the thread whose turn it is may call it."""
        cdef uint64_t begin = snap_now_ns()
        cdef double cost
        self._sample_faults()
        self.writer.chunk(entries, chunk.n_entries, payload, stored, chunk.data_bytes, encoding, crc)
        if stored:
            cost = (snap_now_ns() - begin) / <double>stored
            self.turn.sink_cost = _moving_average(self.turn.sink_cost, cost)
        if encoding == SNAP_RAW:
            self.raw_chunks += 1
        else:
            self.compressed_chunks += 1
        return 0

    cdef int _encode(self, const chunk_ref *chunk, uint64_t ticket, int number) except -1 nogil:
        """Encode and write one chunk. On an error, encoders with later tickets stop waiting for this one."""
        cdef char *data
        cdef uint64_t *entries
        cdef const char *payload
        cdef const char *frame = NULL
        cdef uint64_t stored = chunk.data_bytes
        cdef uint64_t packed = 0
        cdef uint16_t encoding = SNAP_RAW
        cdef uint32_t crc
        cdef bint ended = False, locked = False, has_crc
        try:
            self._load(chunk, number, &data, &entries)
            payload = data
            if self.compressing and stored and self._should_compress(ticket):
                with gil:
                    packed = self._compress(number, data, stored, &frame)
                if packed:
                    payload = frame
                    stored = packed
                    encoding = SNAP_ZSTD
            has_crc = chunk.has_crc and encoding == SNAP_RAW
            crc = chunk.crc if has_crc else crc32c(0, payload, stored)
            locked = True
            if _await_turn(self.turn, ticket):
                self._write(entries, chunk, payload, stored, encoding, crc)
            _end_turn(self.turn)
            ended = True
        finally:
            if not ended:
                _fail_turns(self.turn, locked)
        return 0

    cdef int _loop(self, int number) except -1 nogil:
        cdef chunk_ref chunk
        cdef uint64_t ticket
        if not self.compressing:
            snap_nice_slice(RAW_NICE, LONG_SLICE_NS)
        while pool_take(self.pool.pool, &chunk, &ticket) > 0:
            self._encode(&chunk, ticket, number)
            if chunk.slot != NO_SLOT:
                pool_give_back(self.pool.pool, chunk.slot)
        return 0

    def run(self, int number):
        """Encode and write chunks until the queue is closed and empty. Raises the errors of the sink. Returns
        early, without an error, if another thread of the capture failed."""
        with nogil:
            self._loop(number)
