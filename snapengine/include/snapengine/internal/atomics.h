/* Atomic operations on shared words. This file defines the memory order of each. */
#ifndef SNAPENGINE_ATOMICS_H
#define SNAPENGINE_ATOMICS_H

#include <limits.h>
#include <linux/futex.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static inline uint64_t snap_fetch_or(uint64_t *word, uint64_t bits) {
    return __atomic_fetch_or(word, bits, __ATOMIC_ACQ_REL);
}
static inline uint64_t snap_load(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline void snap_store(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
static inline uint64_t snap_add(uint64_t *word, uint64_t value) {
    return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}
/* For a counter with one writer: no locked instruction. */
static inline void snap_add_one_writer(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, __atomic_load_n(word, __ATOMIC_RELAXED) + value, __ATOMIC_RELAXED);
}
static inline uint64_t snap_load_relaxed(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}
static inline void snap_store_relaxed(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
}
/* For the last access of a thread: its earlier writes are visible to a thread that then reads the count. */
static inline void snap_decrement(uint64_t *count) { __atomic_fetch_sub(count, 1, __ATOMIC_RELEASE); }
static inline uint64_t snap_swap(uint64_t *word, uint64_t value) {
    return __atomic_exchange_n(word, value, __ATOMIC_ACQ_REL);
}
static inline int snap_swap_if(uint64_t *word, uint64_t expected, uint64_t value) {
    return __atomic_compare_exchange_n(word, &expected, value, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
/* Two sides each store one word, then load the other's: with these, at least one side sees the other's store.
 * Release and acquire do not guarantee it. */
static inline void snap_store_seq(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);
}
static inline uint64_t snap_load_seq(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }
/* A futex word that one side stores and the other waits for, across threads and helper processes. It is not a
 * lock: a side that is killed leaves no lock held. */
static inline uint32_t snap_load_word(const uint32_t *word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
static inline void snap_store_wake(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    syscall(SYS_futex, word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT_MAX, 0, 0, 0);
}
/* Wait at most `ns` for the word to be another than `value`; may return early. The kernel compares it again before
 * it sleeps, so no wake-up is lost. */
static inline void snap_futex_timed_wait(uint32_t *word, uint32_t value, uint64_t ns) {
    struct timespec left = {(time_t)(ns / 1000000000ull), (long)(ns % 1000000000ull)};
    syscall(SYS_futex, word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, value, &left, 0, 0);
}
/* Wait until the word is not `value`. */
static inline void snap_futex_wait(uint32_t *word, uint32_t value) {
    while (snap_load_word(word) == value)
        syscall(SYS_futex, word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, value, 0, 0, 0);
}
static inline void snap_pause(void) { __builtin_ia32_pause(); }
static inline int snap_ctz(uint64_t word) { return __builtin_ctzll(word); }
static inline int snap_clz(uint64_t word) { return __builtin_clzll(word); }
static inline int snap_popcount(uint64_t word) { return __builtin_popcountll(word); }

#endif
