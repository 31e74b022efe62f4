/* Atomics, futex and time for the guest's writers. No allocation, no lock. */
#ifndef SNAPENGINE_GUESTSYNC_H
#define SNAPENGINE_GUESTSYNC_H

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

static inline uint64_t guest_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void guest_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint32_t guest_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static inline void guest_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static inline void guest_add32(uint32_t *p, uint32_t v) { __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }

/* A store that the compiler does not merge, drop or reorder; x86 (TSO) keeps the order. */
static inline void guest_put(uint64_t *p, uint64_t v) {
    *(volatile uint64_t *)p = v;
    __asm__ volatile("" ::: "memory");
}

static inline int64_t guest_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline uint64_t guest_ticks(void) { return __rdtsc(); }

/* Returns when *p != value, at a wake-up, or at `deadline_ns` of CLOCK_MONOTONIC (INT64_MAX: never).
 * May return early: the caller checks again. */
static inline void guest_wait(uint32_t *p, uint32_t value, int64_t deadline_ns) {
    struct timespec t = {deadline_ns / 1000000000, deadline_ns % 1000000000};
    syscall(SYS_futex, p, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, value,
            deadline_ns == INT64_MAX ? NULL : &t, NULL, FUTEX_BITSET_MATCH_ANY);
}

static inline void guest_wake(uint32_t *p) {
    syscall(SYS_futex, p, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT_MAX, NULL, NULL, 0);
}

#endif
