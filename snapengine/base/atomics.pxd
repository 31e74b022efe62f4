# extern-only: no matching .pyx
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "snapengine/internal/atomics.h" nogil:
    uint64_t snap_fetch_or(uint64_t *word, uint64_t bits)               # acquire + release
    uint64_t snap_load(const uint64_t *word)                            # acquire
    void snap_store(uint64_t *word, uint64_t value)                     # release
    uint64_t snap_add(uint64_t *word, uint64_t value)                   # relaxed; returns the old value
    void snap_add_one_writer(uint64_t *word, uint64_t value)            # relaxed; one writer only
    uint64_t snap_load_relaxed(const uint64_t *word)                    # relaxed
    void snap_store_relaxed(uint64_t *word, uint64_t value)             # relaxed
    void snap_decrement(uint64_t *count)                                # release
    uint64_t snap_swap(uint64_t *word, uint64_t value)                  # acquire + release; old value
    bint snap_swap_if(uint64_t *word, uint64_t expected, uint64_t value)  # compare-and-swap
    void snap_store_seq(uint64_t *word, uint64_t value)                 # sequentially consistent
    uint64_t snap_load_seq(const uint64_t *word)                        # sequentially consistent
    # Futex words (futex(2)): one side stores, the other waits.
    uint32_t snap_load_word(const uint32_t *word)                       # acquire
    void snap_store_wake(uint32_t *word, uint32_t value)                # release; wakes all waiters
    void snap_futex_timed_wait(uint32_t *word, uint32_t value, uint64_t ns)     # may return early
    void snap_futex_wait(uint32_t *word, uint32_t value)                # until the word is not `value`
    void snap_pause()
    int snap_ctz(uint64_t word)
    int snap_clz(uint64_t word)
    int snap_popcount(uint64_t word)
