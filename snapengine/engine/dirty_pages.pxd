from libc.stdint cimport uint64_t

from snapengine.engine.state cimport capture_t, lane_t, region_t

# Dirty logging, on the thread that runs the rounds. With `wait` a call waits for room in the pool; it ends
# with ETIMEDOUT at `deadline` (ns of CLOCK_MONOTONIC). All return 0 or an errno.

# Copy the populated pages of [page, end).
cdef int copy_pages(capture_t *capture, lane_t *lane, region_t *region, uint64_t page, uint64_t end,
                    bint wait, uint64_t deadline) noexcept nogil
# Protect the pages that were written since the last call, and copy them.
cdef int copy_written(capture_t *capture, lane_t *lane, region_t *region, bint wait,
                      uint64_t deadline) noexcept nogil
# Add to `pages` how many pages copy_written() would find.
cdef int count_written(capture_t *capture, lane_t *lane, region_t *region, uint64_t *pages) noexcept nogil
# Huge pages of a file: copy again what was punched out and filled again.
cdef int copy_punched(capture_t *capture, lane_t *lane, region_t *region, bint wait,
                      uint64_t deadline) noexcept nogil
# In the pause: copy private pages of a memory file that were discarded since they were copied.
cdef int copy_discarded(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil
# In the pause, last: put the holes, and copy what is populated and was never found written.
cdef int put_holes(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil
