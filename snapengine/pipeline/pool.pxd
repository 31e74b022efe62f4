from libc.stdint cimport uint32_t, uint64_t
from posix.types cimport clockid_t

from snapengine.base.arena cimport Arena
from snapengine.base.pthreads cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    ENTRIES_MAX = 2048              # page-map entries in a slot
    NO_SLOT = 0xFFFFFFFF


cdef struct chunk_ref:              # a filled slot in the queue to the encoders
    uint32_t slot                   # NO_SLOT: the chunk is in the spill file
    uint32_t n_entries
    uint64_t data_bytes
    uint64_t spill_offset
    uint32_t crc                    # CRC-32C of the data, if `has_crc`
    bint has_crc


cdef struct pool_t:
    # `lock` protects the fields below it, except where noted. A holder of the lock never waits for the GIL,
    # never allocates, and accesses no memory outside the arena.
    pthread_mutex_t lock
    pthread_cond_t room             # a slot was freed, or the capture failed; the walk waits on it
    pthread_cond_t filled           # a chunk was queued, or `closed` or `failed` was set; encoders wait on it
    uint32_t n_free
    uint32_t min_free               # lowest value of n_free so far
    uint64_t head                   # chunks dequeued
    uint64_t tail                   # chunks queued
    bint closed                     # no more chunks will be queued
    uint64_t failed                 # atomic: set once; read without the lock
    uint64_t waiters                # atomic: threads that wait for a slot; a hint for the encoders
    uint64_t faults_served          # atomic: counted by the fault threads
    uint32_t populated              # slots below this number are populated
    uint64_t spill_end              # bytes of the spill file in use
    uint64_t spilled_bytes
    # Constant after setup.
    char *slots
    uint64_t slot_bytes             # data bytes per slot
    uint64_t stride                 # slot_bytes + page map
    uint32_t n_slots
    uint32_t reserve                # free slots that only fault threads may take
    uint32_t *free_slots            # a stack: the slot freed last is still in the cache
    chunk_ref *ring
    uint64_t ring_mask
    int spill_fd


cdef struct lane_slot:
    # The open slot of one capture thread. Only that thread accesses it.
    uint32_t slot
    uint32_t n_entries
    uint64_t used                   # data bytes
    char *data
    uint64_t *entries
    bint computes_crc               # constant: this thread checksums the chunks that it queues
    uint32_t crc                    # CRC-32C of the first `crc_bytes` bytes of data
    uint64_t crc_bytes


cdef char *slot_data(pool_t *pool, uint32_t slot) noexcept nogil
cdef uint64_t *slot_entries(pool_t *pool, uint32_t slot) noexcept nogil

# Allocate the first slot of a thread. Returns 0, or ENOBUFS.
cdef int lane_open(pool_t *pool, lane_slot *lane) noexcept nogil
# Make room for `pages` data pages and as many entries. Returns 0 or an errno. With `wait` it waits until an
# encoder frees a slot. Without `wait` it never waits: it uses the reserve, then spills to the file.
cdef int lane_room(pool_t *pool, lane_slot *lane, uint64_t pages, bint wait) noexcept nogil
# Whether lane_room() would wait now.
cdef bint lane_waits(pool_t *pool, lane_slot *lane, uint64_t pages) noexcept nogil
# Number of data pages that still fit the open slot, with one entry each.
cdef uint64_t lane_pages(pool_t *pool, lane_slot *lane) noexcept nogil
# Whether that many slots are free beyond the reserve. Another thread may take them at any time.
cdef bint pool_has_room(pool_t *pool, uint32_t slots) noexcept nogil
# Wait until that many slots (or all that can be) are free beyond the reserve, or the capture fails.
cdef void pool_await(pool_t *pool, uint64_t slots) noexcept nogil
# Whether any slot is free, the reserve included: a fault thread then need not spill.
cdef bint pool_has_any(pool_t *pool) noexcept nogil
# Append an entry to the page map; merge it with the previous one if possible.
cdef void lane_entry(lane_slot *lane, uint64_t page, uint64_t pages, unsigned kind) noexcept nogil
# Queue the chunk in the slot and release the slot. Returns 0 or an errno.
cdef int lane_close(pool_t *pool, lane_slot *lane) noexcept nogil

cdef void pool_finish(pool_t *pool) noexcept nogil                     # no more chunks will be queued
cdef void pool_fail(pool_t *pool) noexcept nogil                    # the capture failed: wake all waiters
# Wait for the next chunk. Returns 1; 0: closed and empty; -1: failed. `ticket` counts from 0.
cdef int pool_take(pool_t *pool, chunk_ref *chunk, uint64_t *ticket) noexcept nogil
# Read a spilled chunk into `data` and `entries`, and free its space in the file. Returns 0 or an errno.
cdef int pool_read_back(pool_t *pool, const chunk_ref *chunk, char *data, uint64_t *entries) noexcept nogil
cdef void pool_give_back(pool_t *pool, uint32_t slot) noexcept nogil


cdef class Pool:
    # Owns the slots, the queue and the spill file of one capture.
    cdef Arena control
    cdef Arena memory
    cdef Arena queue
    cdef pool_t *pool
    cdef object spill_file
