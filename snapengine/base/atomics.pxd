# extern-only: no matching .pyx
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "snapengine/internal/atomics.h" nogil:
    uint64_t snap_fetch_or(uint64_t *word, uint64_t bits)               # acquire + release
    uint64_t snap_load(const uint64_t *word)                            # acquire
    void snap_store(uint64_t *word, uint64_t value)                     # release
    uint64_t snap_add(uint64_t *word, uint64_t value)                   # relaxed; returns the old value
    void snap_bump(uint64_t *word, uint64_t value)                      # relaxed; one writer only
    uint64_t snap_peek(const uint64_t *word)                            # relaxed
    void snap_set(uint64_t *word, uint64_t value)                       # relaxed
    void snap_leave(uint64_t *count)                                    # release; one less
    uint64_t snap_swap(uint64_t *word, uint64_t value)                  # acquire + release; the old value
    bint snap_swap_if(uint64_t *word, uint64_t expected, uint64_t value)  # compare-and-swap
    void snap_store_seq(uint64_t *word, uint64_t value)                 # sequentially consistent
    uint64_t snap_load_seq(const uint64_t *word)                        # sequentially consistent
    # A word that one side stores and the other waits for; by futex(2), without a lock.
    uint32_t snap_word(const uint32_t *word)                            # acquire
    void snap_tell(uint32_t *word, uint32_t value)                      # release; wakes who waits
    void snap_wait_while(uint32_t *word, uint32_t value)
    void snap_pause()
    int snap_ctz(uint64_t word)
    int snap_clz(uint64_t word)
    int snap_popcount(uint64_t word)
