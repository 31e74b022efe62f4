"""Encoders: filled slots become chunks of the image, in the order they were filled.

Each thread takes a chunk, compresses it (zstandard needs the GIL for a moment per chunk and gives it
back while it works), and waits for its turn to write. Without compression nothing here needs the GIL.
No capture thread ever waits for an encoder, except the walk, for room in the pool.

A chunk is stored raw if it does not shrink, or if compressing it would hold up somebody who matters and,
by the costs measured so far, raw bytes would leave faster. A walk that waits for room holds up nobody by
itself: the pages it has not reached are only protected. It matters when writers run into them (a fault
costs a writer 20 to 50 µs), and always where the walk's length is the target's pause or its next round.
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

cdef double KEEP = 0.9              # of the old estimate, for each new chunk
# A thread that only writes sleeps most of the time, and whoever waits for its slot waits for the sink: it
# should not queue behind the walkers. One that compresses must not take the CPU from the target.
cdef int WRITER_NICE = -10
cdef uint64_t PROBE = 16            # while raw is better, still compress every so many chunks to measure
# Writers fault so often that it matters: more than once in this time, which costs them 2 to 5 % of a CPU.
cdef uint64_t FAULT_NS = 1_000_000
cdef uint64_t LOOK_NS = 5_000_000

_STORE_RAW = {"never": RAW_NEVER, "writers": RAW_FOR_WRITERS, "room": RAW_FOR_ROOM}


cdef bint _await_turn(turn_t *turn, uint64_t ticket) noexcept nogil:
    """Holds the lock on return; False if another writer failed."""
    pthread_mutex_lock(&turn.lock)
    while turn.next != ticket and not turn.broken:
        pthread_cond_wait(&turn.changed, &turn.lock)
    return not turn.broken


cdef void _end_turn(turn_t *turn) noexcept nogil:
    turn.next += 1
    pthread_cond_broadcast(&turn.changed)
    pthread_mutex_unlock(&turn.lock)


cdef void _break_turns(turn_t *turn, bint locked) noexcept nogil:
    if not locked:
        pthread_mutex_lock(&turn.lock)
    turn.broken = True
    pthread_cond_broadcast(&turn.changed)
    pthread_mutex_unlock(&turn.lock)


cdef double _mixed(double old, double new) noexcept nogil:
    return new if old == 0 else KEEP * old + (1 - KEEP) * new


cdef class Encoder:
    """The encoder side of one capture; `run` is the body of each of `threads` threads.

    `store_raw`: when a chunk that would shrink may be stored raw, if that is faster: ``"never"``;
    ``"writers"``, while writers fault and the walk waits for room; ``"room"``, while anybody waits for room.
    `follow_sink`: the level is chosen by what compression and sink were measured to cost.
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
        self.packed = [b""] * threads
        self.fixed_level = level if self.compressing else 0
        self.levels = Levels(threads) if self.compressing and follow_sink else None
        self.compressors = [{} for _ in range(threads)]

    @property
    def scratch_bytes(self):
        """Bytes that the encoders hold beside the pool."""
        return self.threads * self.pool.pool.stride * (2 if self.compressing else 1)

    @property
    def level(self):
        """The zstd level of the next chunk; None without compression."""
        if not self.compressing:
            return None
        return self.fixed_level if self.levels is None else self.levels.level

    cdef object _compressor(self, int number, level):
        """One per thread and level, made when it is needed: each has tables of up to some MiB."""
        cdef dict mine = self.compressors[number]
        if level not in mine:
            mine[level] = zstandard.ZstdCompressor(level=level)
        return mine[level]

    cdef void _look_at_faults(self) noexcept nogil:
        """Only by the thread whose turn it is."""
        cdef uint64_t now = snap_now_ns()
        cdef uint64_t urgent = snap_load(&self.pool.pool.urgent)
        if now - self.turn.seen_ns < LOOK_NS:
            return
        self.turn.writers_fault = (urgent - self.turn.urgent_seen) * FAULT_NS > now - self.turn.seen_ns
        self.turn.urgent_seen = urgent
        self.turn.seen_ns = now

    cdef bint _worth_it(self, uint64_t ticket) noexcept nogil:
        cdef double zstd_cost, raw_cost
        if self.store_raw == RAW_NEVER or (self.store_raw == RAW_FOR_WRITERS and not self.turn.writers_fault):
            return True
        if not snap_load(&self.pool.pool.starved) or self.turn.sink_cost == 0 or ticket % PROBE == 0:
            return True
        raw_cost = self.turn.sink_cost
        zstd_cost = max(self.turn.compress_cost / self.threads, self.turn.sink_cost * self.turn.ratio)
        return zstd_cost <= raw_cost

    cdef uint64_t _pack(self, int number, const char *data, uint64_t length,
                        const char **frame) except? 0:
        """Compress into packed[number]. The length of the frame, or 0 if that does not save a sixteenth."""
        cdef uint64_t begin = snap_now_ns()
        cdef uint64_t stored
        cdef double cost
        level = self.level
        view = PyMemoryView_FromMemory(<char *>data, length, PyBUF_READ)
        packed = self._compressor(number, level).compress(view)
        stored = len(packed)
        cost = (snap_now_ns() - begin) / <double>length
        self.turn.compress_cost = _mixed(self.turn.compress_cost, cost)
        self.turn.ratio = _mixed(self.turn.ratio, stored / <double>length)
        if self.levels is not None:
            self.levels.note(level, cost, stored / <double>length, self.turn.sink_cost)
            packed = self._probe(number, level, view, packed, cost)
            stored = len(packed)
        self.packed[number] = packed            # keeps the frame alive until this thread's next one
        frame[0] = PyBytes_AS_STRING(packed)
        return stored if stored < length - length // 16 else 0

    cdef bytes _probe(self, int number, level, view, bytes packed, double cost):
        """Compress the chunk at the next level, too, if that is to be known. The smaller of both frames."""
        cdef uint64_t begin = snap_now_ns()
        above = self.levels.probe(level)
        if above is None:
            return packed
        other = self._compressor(number, above).compress(view)
        taken = (snap_now_ns() - begin) / <double>len(view)
        self.levels.compare(above, taken / cost, len(other) / <double>len(packed))
        return min(other, packed, key=len)

    cdef int _load(self, const chunk_ref *chunk, int number, char **data, uint64_t **entries) except -1 nogil:
        """Where the chunk's bytes are; reads them back if they were spilled."""
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
        """Only by the thread whose turn it is."""
        cdef uint64_t begin = snap_now_ns()
        self._look_at_faults()
        self.writer.chunk(entries, chunk.n_entries, payload, stored, chunk.data_bytes, encoding, crc)
        if stored:
            self.turn.sink_cost = _mixed(self.turn.sink_cost, (snap_now_ns() - begin) / <double>stored)
        if encoding == SNAP_RAW:
            self.raw_chunks += 1
        else:
            self.compressed_chunks += 1
        return 0

    cdef int _encode(self, const chunk_ref *chunk, uint64_t ticket, int number) except -1 nogil:
        """One chunk. Whatever goes wrong, encoders with later tickets do not wait for this one."""
        cdef char *data
        cdef uint64_t *entries
        cdef const char *payload
        cdef const char *frame = NULL
        cdef uint64_t stored = chunk.data_bytes
        cdef uint64_t packed = 0
        cdef uint16_t encoding = SNAP_RAW
        cdef uint32_t crc
        cdef bint ended = False, held = False, summed
        try:
            self._load(chunk, number, &data, &entries)
            payload = data
            if self.compressing and stored and self._worth_it(ticket):
                with gil:
                    packed = self._pack(number, data, stored, &frame)
                if packed:
                    payload = frame
                    stored = packed
                    encoding = SNAP_ZSTD
            summed = chunk.summed and encoding == SNAP_RAW
            crc = chunk.crc if summed else crc32c(0, payload, stored)
            held = True
            if _await_turn(self.turn, ticket):
                self._write(entries, chunk, payload, stored, encoding, crc)
            _end_turn(self.turn)
            ended = True
        finally:
            if not ended:
                _break_turns(self.turn, held)
        return 0

    cdef int _loop(self, int number) except -1 nogil:
        cdef chunk_ref chunk
        cdef uint64_t ticket
        if not self.compressing:
            snap_nice_slice(WRITER_NICE, LONG_SLICE_NS)
        while pool_take(self.pool.pool, &chunk, &ticket) > 0:
            self._encode(&chunk, ticket, number)
            if chunk.slot != NO_SLOT:
                pool_give_back(self.pool.pool, chunk.slot)
        return 0

    def run(self, int number):
        """Encode and write until the queue is closed and empty. Raises what the sink raises; returns early
        and silently if another thread of the capture failed."""
        with nogil:
            self._loop(number)
