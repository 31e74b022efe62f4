from libc.stdint cimport uint64_t

from snapengine.pipeline.pool cimport chunk_ref, lane_slot, pool_t

# Write what the slot holds to that place of the spill file. 0 or errno.
cdef int spill_put(pool_t *pool, const lane_slot *lane, uint64_t offset) noexcept nogil
# Read a spilled chunk into `data` and `entries` and free its place in the file. 0 or errno.
cdef int spill_take(pool_t *pool, const chunk_ref *chunk, char *data, uint64_t *entries) noexcept nogil
