"""Slots between the capture threads and the encoders: bounded memory, then a spill file.

A slot holds the data pages and the page map of one future chunk. Each capture thread fills its own slot and
queues it when it is full. The queue is FIFO, which dirty logging requires: the last version of a page is the
valid one. When no slot is free, the walk waits. A fault thread never waits: it uses the reserve, then writes
its slot to the spill file. `lock` is held for a few dozen instructions.

A thread may be preempted at any instruction. If it does not hold the lock, the others continue with the
remaining slots. If it holds the lock, they wait for the scheduler, never for the GIL, the sink or a fault.
"""

from libc.errno cimport ENOBUFS

import tempfile

from snapengine.base.arena cimport Arena
from snapengine.base.atomics cimport snap_add, snap_load, snap_store
from snapengine.base.checksum cimport crc32c
from snapengine.image.format cimport (
    SNAP_ENTRY_MAX_PAGES, snap_entry, snap_entry_kind, snap_entry_page, snap_entry_pages,
)
from snapengine.base.pthreads cimport (
    pthread_cond_broadcast, pthread_cond_init, pthread_cond_signal, pthread_cond_wait,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from snapengine.pipeline.spill cimport spill_extent, spill_read, spill_write

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *addr, size_t length, int advice)

cdef extern from "snapengine/internal/linux_compat.h" nogil:
    const int MADV_POPULATE_WRITE

cdef uint64_t PAGE = 4096
cdef uint64_t MAP_BYTES = ENTRIES_MAX * 8
cdef uint64_t PREPOPULATED_SLOTS = 16   # before arming: enough for a capture whose sink keeps up
SLOT_BYTES = 1 << 20
SMALL_SLOT_BYTES = 256 << 10


cdef char *slot_data(pool_t *pool, uint32_t slot) noexcept nogil:
    return pool.slots + slot * pool.stride


cdef uint64_t *slot_entries(pool_t *pool, uint32_t slot) noexcept nogil:
    return <uint64_t *>(pool.slots + slot * pool.stride + pool.slot_bytes)


cdef void _use_slot(pool_t *pool, lane_slot *lane, uint32_t slot) noexcept nogil:
    lane.slot = slot
    lane.n_entries = 0
    lane.used = 0
    lane.crc = 0
    lane.crc_bytes = 0
    lane.data = slot_data(pool, slot)
    lane.entries = slot_entries(pool, slot)


cdef void _populate_slot(pool_t *pool, uint32_t slot) noexcept nogil:
    """Populate a slot in one call, before a page is claimed: a first access costs 11 µs per page where a
    hypervisor backs memory lazily. Most captures need few slots, so not all are populated before arming."""
    cdef char *start = slot_data(pool, slot)
    cdef uint64_t offset
    if madvise(start, pool.stride, MADV_POPULATE_WRITE) != 0:
        for offset in range(pool.stride // PAGE):
            start[offset * PAGE] = 0


cdef uint32_t _pop_free(pool_t *pool, bint *fresh) noexcept nogil:
    pool.n_free -= 1
    if pool.n_free < pool.min_free:
        pool.min_free = pool.n_free
    fresh[0] = pool.free_slots[pool.n_free] >= pool.populated
    if fresh[0]:
        pool.populated = pool.free_slots[pool.n_free] + 1
    return pool.free_slots[pool.n_free]


cdef void _complete_crc(lane_slot *lane) noexcept nogil:
    """Checksum the bytes that were not checksummed during the copy. The data is still in this core's cache.
    An encoder on another core would have to fetch it, and the queued slots would exceed the cache."""
    if lane.computes_crc and lane.crc_bytes < lane.used:
        lane.crc = crc32c(lane.crc, lane.data + lane.crc_bytes, lane.used - lane.crc_bytes)
        lane.crc_bytes = lane.used


cdef int _queue(pool_t *pool, uint32_t slot, lane_slot *lane, uint64_t spill_offset) noexcept nogil:
    cdef chunk_ref *ref
    if pool.tail - pool.head > pool.ring_mask:
        return ENOBUFS
    ref = &pool.ring[pool.tail & pool.ring_mask]
    ref.slot = slot
    ref.n_entries = lane.n_entries
    ref.data_bytes = lane.used
    ref.spill_offset = spill_offset
    ref.crc = lane.crc
    ref.has_crc = lane.computes_crc and lane.crc_bytes == lane.used
    pool.tail += 1
    pthread_cond_signal(&pool.filled)
    return 0


cdef void _fill_extent(pool_t *pool, uint64_t offset, uint64_t data_bytes, uint32_t n_entries,
                       spill_extent *extent) noexcept nogil:
    extent.offset = offset
    extent.bytes = pool.stride
    extent.entries_offset = pool.slot_bytes
    extent.data_bytes = data_bytes
    extent.n_entries = n_entries


cdef int pool_read_back(pool_t *pool, const chunk_ref *chunk, char *data, uint64_t *entries) noexcept nogil:
    cdef spill_extent extent
    _fill_extent(pool, chunk.spill_offset, chunk.data_bytes, chunk.n_entries, &extent)
    return spill_read(pool.spill_fd, &extent, data, entries)


cdef int _spill(pool_t *pool, lane_slot *lane) noexcept nogil:
    """Write the slot to the spill file and queue the copy. The thread keeps the slot, now empty."""
    cdef spill_extent extent
    cdef uint64_t offset
    cdef int err
    pthread_mutex_lock(&pool.lock)
    offset = pool.spill_end
    pool.spill_end += pool.stride
    pool.spilled_bytes += lane.used
    pthread_mutex_unlock(&pool.lock)
    _fill_extent(pool, offset, lane.used, lane.n_entries, &extent)
    err = spill_write(pool.spill_fd, &extent, lane.data, lane.entries)
    if err:
        return err
    pthread_mutex_lock(&pool.lock)
    err = _queue(pool, NO_SLOT, lane, offset)
    pthread_mutex_unlock(&pool.lock)
    _use_slot(pool, lane, lane.slot)
    return err


cdef int lane_open(pool_t *pool, lane_slot *lane) noexcept nogil:
    cdef int err = 0
    cdef bint fresh
    pthread_mutex_lock(&pool.lock)
    if pool.n_free:
        _use_slot(pool, lane, _pop_free(pool, &fresh))
    else:
        err = ENOBUFS
    pthread_mutex_unlock(&pool.lock)
    return err


cdef inline bint _fits(pool_t *pool, lane_slot *lane, uint64_t pages) noexcept nogil:
    return lane.used + pages * PAGE <= pool.slot_bytes and lane.n_entries + pages <= ENTRIES_MAX


cdef int lane_room(pool_t *pool, lane_slot *lane, uint64_t pages, bint wait) noexcept nogil:
    cdef int err = 0
    cdef bint fresh = False
    if _fits(pool, lane, pages):
        return 0
    _complete_crc(lane)
    pthread_mutex_lock(&pool.lock)
    if wait:
        snap_add(&pool.waiters, 1)
        while pool.n_free <= pool.reserve and not snap_load(&pool.failed):
            pthread_cond_wait(&pool.room, &pool.lock)
        snap_add(&pool.waiters, <uint64_t>-1)
    if pool.n_free:
        err = _queue(pool, lane.slot, lane, 0)
        if not err:
            _use_slot(pool, lane, _pop_free(pool, &fresh))
        pthread_mutex_unlock(&pool.lock)
        if wait and fresh and not err:
            _populate_slot(pool, lane.slot)
        return err
    pthread_mutex_unlock(&pool.lock)
    if wait:                        # reached only if the capture failed: its data is discarded
        _use_slot(pool, lane, lane.slot)
        return 0
    return _spill(pool, lane)


cdef bint lane_waits(pool_t *pool, lane_slot *lane, uint64_t pages) noexcept nogil:
    return not _fits(pool, lane, pages) and not pool_has_room(pool, 1)


cdef uint64_t lane_pages(pool_t *pool, lane_slot *lane) noexcept nogil:
    return min((pool.slot_bytes - lane.used) // PAGE, <uint64_t>(ENTRIES_MAX - lane.n_entries))


cdef bint pool_has_room(pool_t *pool, uint32_t slots) noexcept nogil:
    cdef bint has
    pthread_mutex_lock(&pool.lock)
    has = pool.n_free >= pool.reserve + slots
    pthread_mutex_unlock(&pool.lock)
    return has


cdef void pool_await(pool_t *pool, uint64_t slots) noexcept nogil:
    # Limited to the number that can be free: each lane holds one slot, and the reserve is as large.
    slots = pool.reserve + min(slots, <uint64_t>(pool.n_slots - 2 * pool.reserve))
    pthread_mutex_lock(&pool.lock)
    snap_add(&pool.waiters, 1)
    while pool.n_free < slots and not snap_load(&pool.failed):
        pthread_cond_wait(&pool.room, &pool.lock)
    snap_add(&pool.waiters, <uint64_t>-1)
    pthread_mutex_unlock(&pool.lock)


cdef bint pool_has_any(pool_t *pool) noexcept nogil:
    cdef bint has
    pthread_mutex_lock(&pool.lock)
    has = pool.n_free > 0
    pthread_mutex_unlock(&pool.lock)
    return has


cdef void lane_entry(lane_slot *lane, uint64_t page, uint64_t pages, unsigned kind) noexcept nogil:
    cdef uint64_t last, n
    if lane.n_entries:
        last = lane.entries[lane.n_entries - 1]
        n = snap_entry_pages(last)
        if snap_entry_kind(last) == kind and snap_entry_page(last) + n == page \
                and n + pages <= SNAP_ENTRY_MAX_PAGES:
            lane.entries[lane.n_entries - 1] = snap_entry(snap_entry_page(last), n + pages, kind)
            return
    lane.entries[lane.n_entries] = snap_entry(page, pages, kind)
    lane.n_entries += 1


cdef int lane_close(pool_t *pool, lane_slot *lane) noexcept nogil:
    cdef int err = 0
    if lane.slot == NO_SLOT:
        return 0
    _complete_crc(lane)
    pthread_mutex_lock(&pool.lock)
    if lane.n_entries:
        err = _queue(pool, lane.slot, lane, 0)
    else:
        pool.free_slots[pool.n_free] = lane.slot
        pool.n_free += 1
        pthread_cond_broadcast(&pool.room)
    lane.slot = NO_SLOT
    pthread_mutex_unlock(&pool.lock)
    return err


cdef void pool_finish(pool_t *pool) noexcept nogil:
    pthread_mutex_lock(&pool.lock)
    pool.closed = True
    pthread_cond_broadcast(&pool.filled)
    pthread_mutex_unlock(&pool.lock)


cdef void pool_fail(pool_t *pool) noexcept nogil:
    pthread_mutex_lock(&pool.lock)
    snap_store(&pool.failed, 1)
    pthread_cond_broadcast(&pool.room)
    pthread_cond_broadcast(&pool.filled)
    pthread_mutex_unlock(&pool.lock)


cdef int pool_take(pool_t *pool, chunk_ref *chunk, uint64_t *ticket) noexcept nogil:
    cdef int status
    pthread_mutex_lock(&pool.lock)
    while pool.head == pool.tail and not pool.closed and not snap_load(&pool.failed):
        pthread_cond_wait(&pool.filled, &pool.lock)
    if snap_load(&pool.failed):
        status = -1
    elif pool.head == pool.tail:
        status = 0
    else:
        chunk[0] = pool.ring[pool.head & pool.ring_mask]
        ticket[0] = pool.head
        pool.head += 1
        status = 1
    pthread_mutex_unlock(&pool.lock)
    return status


cdef void pool_give_back(pool_t *pool, uint32_t slot) noexcept nogil:
    pthread_mutex_lock(&pool.lock)
    pool.free_slots[pool.n_free] = slot
    pool.n_free += 1
    if pool.n_free > pool.reserve:
        pthread_cond_broadcast(&pool.room)     # walkers wait for different numbers of slots
    pthread_mutex_unlock(&pool.lock)


# The slot memory of the last capture, reused by the next one. Where a hypervisor backs memory lazily and
# reclaims free memory, the first access to 16 MiB costs 50 to 120 ms. Protected by the GIL.
cdef Arena _cached = None


cdef Arena _allocate_slots(uint64_t length):
    global _cached
    cdef Arena memory = _cached
    if memory is not None and length <= memory.length <= 2 * length:
        _cached = None
        return memory
    return Arena(length)


cdef void _cache(Arena memory):
    global _cached
    memory.mark_free()
    _cached = memory


def check_room(uint64_t memory_limit, int lanes, int encoders):
    """Raise ValueError if the limit is too small for this number of capture and encoder threads."""
    if memory_limit // (SMALL_SLOT_BYTES + MAP_BYTES) < <uint64_t>(2 * lanes + 2 + 2 * encoders):
        raise ValueError(f"memory_limit: {memory_limit} bytes are too few for {lanes} capture threads "
                         f"and {encoders} encoder threads")


cdef class Pool:
    """Slots, queue and spill file of one capture.

    Parameters
    ----------
    memory_limit:
        Bytes for slots, including the scratch memory of the encoders.
    total_pages:
        Pages of the target; limits the pool of a small target.
    lanes:
        Number of capture threads; each has one open slot.
    encoders:
        Number of encoder threads. `memory_limit` includes two slots of scratch memory for each.
    spill_dir:
        Directory of the spill file, or None for the system's temporary directory.

    Raises ValueError if the limit is too small for the threads, OSError if the file cannot be created.
    """

    def __init__(self, uint64_t memory_limit, uint64_t total_pages, int lanes, int encoders, spill_dir=None):
        cdef uint64_t slot_bytes = SLOT_BYTES
        cdef uint64_t least = 2 * lanes + 2
        cdef uint64_t n, ring, i
        if memory_limit < (SLOT_BYTES + MAP_BYTES) * (2 * least + 2 * encoders):
            slot_bytes = SMALL_SLOT_BYTES
        check_room(memory_limit, lanes, encoders)
        n = memory_limit // (slot_bytes + MAP_BYTES)
        n = min(n - 2 * encoders, least + total_pages * PAGE // slot_bytes + 1)
        self.spill_file = tempfile.TemporaryFile(buffering=0, dir=spill_dir, prefix="snapengine-spill-")
        # A chunk is queued only when it is full or another 64 pages do not fit. That limits the number of
        # chunks in the spill file at one time.
        ring = 64
        while ring < n + 2 * lanes + total_pages // 32:
            ring *= 2
        self.control = Arena(sizeof(pool_t) + n * 4)
        self.control.touch()
        self.memory = _allocate_slots(n * (slot_bytes + MAP_BYTES))
        self.memory.touch(min(n, max(least, PREPOPULATED_SLOTS)) * (slot_bytes + MAP_BYTES))
        self.queue = Arena(ring * sizeof(chunk_ref))
        self.pool = <pool_t *>self.control.base
        pthread_mutex_init(&self.pool.lock, NULL)
        pthread_cond_init(&self.pool.room, NULL)
        pthread_cond_init(&self.pool.filled, NULL)
        self.pool.slots = self.memory.base
        self.pool.slot_bytes = slot_bytes
        self.pool.stride = slot_bytes + MAP_BYTES
        self.pool.n_slots = n
        self.pool.n_free = n
        self.pool.populated = min(n, max(least, PREPOPULATED_SLOTS))
        self.pool.min_free = n
        self.pool.reserve = lanes
        self.pool.free_slots = <uint32_t *>(self.control.base + sizeof(pool_t))
        self.pool.ring = <chunk_ref *>self.queue.base
        self.pool.ring_mask = ring - 1
        self.pool.spill_fd = self.spill_file.fileno()
        for i in range(n):
            self.pool.free_slots[i] = n - 1 - i

    @property
    def peak_bytes(self):
        """Largest number of bytes in used slots at one time."""
        return (self.pool.n_slots - self.pool.min_free) * self.pool.stride

    @property
    def spilled_bytes(self):
        """Bytes of data that were written to the spill file."""
        return self.pool.spilled_bytes

    @property
    def slots(self):
        """Number of slots."""
        return self.pool.n_slots

    @property
    def stride(self):
        """Bytes of one slot, including its page map."""
        return self.pool.stride

    def close(self):
        """Free the slots and the spill file (an unnamed file, whose space this frees). Idempotent. All
        threads must have ended."""
        self.spill_file.close()
        if self.memory is not None:
            _cache(self.memory)
        self.memory = None
        self.queue = None
