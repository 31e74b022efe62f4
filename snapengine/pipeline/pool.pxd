from libc.stdint cimport uint32_t, uint64_t
from posix.types cimport clockid_t

from snapengine.base.arena cimport Arena
from snapengine.base.pthreads cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    ENTRIES_MAX = 2048              # page-map entries in a slot
    NO_SLOT = 0xFFFFFFFF


cdef struct chunk_ref:              # a filled slot on its way to an encoder
    uint32_t slot                   # NO_SLOT: it lies in the spill file
    uint32_t n_entries
    uint64_t data_bytes
    uint64_t spill_offset
    uint32_t crc                    # of the data, if `summed`
    bint summed


cdef struct pool_t:
    # Every field below `lock` is read and written under it, except where noted. No holder of the
    # lock waits for the GIL, allocates or touches anything outside the arena.
    pthread_mutex_t lock
    pthread_cond_t room             # a slot came back, or the capture failed: the walk waits here
    pthread_cond_t filled           # a chunk was queued, or closed, or failed: encoders wait here
    uint32_t n_free
    uint32_t least_free
    uint64_t head                   # chunks taken
    uint64_t tail                   # chunks queued
    bint closed                     # no more chunks will come
    uint64_t failed                 # atomic: set once; read without the lock
    uint64_t starved                # atomic: threads waiting for room, a hint for the encoders
    uint64_t urgent                 # atomic: faults that were served (by who serves them)
    uint32_t touched                # slots below this number have their memory
    uint64_t spill_end              # bytes of the spill file in use
    uint64_t spilled_bytes
    # Fixed after set-up.
    char *slots
    uint64_t slot_bytes             # data bytes of a slot
    uint64_t stride                 # slot_bytes + page map
    uint32_t n_slots
    uint32_t reserve                # free slots that only fault threads may take
    uint32_t *free_slots            # a stack: the slot used last is the one still in the cache
    chunk_ref *ring
    uint64_t ring_mask
    int spill_fd


cdef struct lane_slot:
    # The open slot of one capture thread: only that thread touches it.
    uint32_t slot
    uint32_t n_entries
    uint64_t used                   # data bytes
    char *data
    uint64_t *entries
    bint sums                       # fixed: this thread also computes the checksum of what it queues
    uint32_t crc                    # of the first `summed` bytes of data (who copies may sum as it goes)
    uint64_t summed


cdef char *slot_data(pool_t *pool, uint32_t slot) noexcept nogil
cdef uint64_t *slot_entries(pool_t *pool, uint32_t slot) noexcept nogil

# Take the first slot of a thread. Returns 0, or ENOBUFS.
cdef int lane_open(pool_t *pool, lane_slot *lane) noexcept nogil
# Make room for `pages` data pages and as many entries: 0, or an errno. With `wait` it waits until an
# encoder frees a slot; without, it takes the reserve and then spills to the file, and never waits.
cdef int lane_room(pool_t *pool, lane_slot *lane, uint64_t pages, bint wait) noexcept nogil
# Whether lane_room() would wait now.
cdef bint lane_waits(pool_t *pool, lane_slot *lane, uint64_t pages) noexcept nogil
# Data pages that the open slot still takes, whatever their entries.
cdef uint64_t lane_pages(pool_t *pool, lane_slot *lane) noexcept nogil
# Whether so many slots are free beside the reserve. A moment later another thread may have them.
cdef bint pool_has_room(pool_t *pool, uint32_t slots) noexcept nogil
# Wait until so many slots are free beside the reserve, or as many as there can be, or the capture has failed.
cdef void pool_await(pool_t *pool, uint64_t slots) noexcept nogil
# Whether a fault thread would get a slot, if only of the reserve: then nothing has to be spilled yet.
cdef bint pool_has_any(pool_t *pool) noexcept nogil
# Append to the page map, merging with the entry before it.
cdef void lane_entry(lane_slot *lane, uint64_t page, uint64_t pages, unsigned kind) noexcept nogil
# Queue what the slot holds and give the slot up. 0 or errno.
cdef int lane_close(pool_t *pool, lane_slot *lane) noexcept nogil

cdef void pool_end(pool_t *pool) noexcept nogil                     # no more chunks
cdef void pool_fail(pool_t *pool) noexcept nogil                    # wake everybody: give up
# Next chunk, waiting for one: 1; 0 when closed and empty; -1 when failed. `ticket` counts from 0.
cdef int pool_take(pool_t *pool, chunk_ref *chunk, uint64_t *ticket) noexcept nogil
# Encoders: read a chunk that was spilled into `data` and `entries`, and free its place in the file. 0 or
# errno.
cdef int pool_read_back(pool_t *pool, const chunk_ref *chunk, char *data, uint64_t *entries) noexcept nogil
cdef void pool_give_back(pool_t *pool, uint32_t slot) noexcept nogil


cdef class Pool:
    # Owns the slots, the queue and the spill file of one capture.
    cdef Arena control
    cdef Arena memory
    cdef Arena queue
    cdef pool_t *pool
    cdef object spill_file
