/* Writes in a known order: write n is the number n, into the words 0 and 511 of page n * stride % pages.
 *
 * Memory that holds the write n must hold all writes before it. Several threads take turns. The turn is a word in
 * another mapping: n before write n, and n + 1 after it. Each write first checks that its page holds the previous
 * write to that page: a lost write is an error. */
#ifndef ORDER_H
#define ORDER_H

#include "target.h"
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>

static uint64_t *order_memory, order_pages, order_stride, order_threads;
static _Atomic uint64_t *order_turn;

static inline void order_write(uint64_t n) {
    volatile uint64_t *page = order_memory + n * order_stride % order_pages * 512;
    uint64_t before = n > order_pages ? n - order_pages : 0;
    if (page[0] != before || page[511] != before)
        words[ERRORS]++;
    page[0] = n;
    page[511] = n; /* x86-64 keeps the order of stores, and volatile that of the compiler */
}

static void *order_thread(void *arg) {
    uint64_t me = (uint64_t)arg;
    for (uint64_t n = order_pages + 1 + me;; n += order_threads) {
        while (*order_turn != n)
            sched_yield();
        order_write(n);
        words[COUNTERS + me] = n;
        *order_turn = n + 1;
    }
    return arg;
}

static void *order_map(const char *kind, uint64_t bytes) {
    int huge = !strcmp(kind, "hugetlb") ? MAP_HUGETLB : 0, fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    char *memory;
    if (!strcmp(kind, "heap")) {
        mallopt(M_MMAP_MAX, 0);
        memory = memalign(4096, bytes);
        madvise(memory, bytes, MADV_NOHUGEPAGE);
        return memset(memory, 0, bytes);
    }
    if (!strcmp(kind, "memfd")) {
        flags = MAP_SHARED;
        fd = memfd_create("order", 0);
        if (ftruncate(fd, (off_t)bytes))
            exit(5);
    }
    if (!strcmp(kind, "thp")) {
        memory = mmap(0, bytes + (2 << 20), PROT_READ | PROT_WRITE, flags, -1, 0);
        memory += -(uint64_t)memory & ((2 << 20) - 1);
        madvise(memory, bytes, MADV_HUGEPAGE);
        return memory;
    }
    memory = mmap(0, bytes, PROT_READ | PROT_WRITE, flags | huge, fd, 0);
    if (memory == MAP_FAILED)
        exit(6);
    if (!huge)
        madvise(memory, bytes, MADV_NOHUGEPAGE);
    return memory;
}

/* MEMORY and PAGES are set, VALUES is the address of the turn; returns when all pages are written. */
static inline void order_begin(const char *kind, uint64_t threads, uint64_t pages, uint64_t stride) {
    pthread_t thread;
    order_threads = threads;
    order_pages = pages;
    order_stride = stride;
    order_turn = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    order_memory = order_map(kind, pages * 4096);
    for (uint64_t n = 1; n <= pages; n++)
        order_write(n);
    *order_turn = pages + 1;
    words[MEMORY] = (uint64_t)order_memory;
    words[PAGES] = pages;
    words[VALUES] = (uint64_t)order_turn;
    for (uint64_t i = 0; i < threads; i++)
        pthread_create(&thread, 0, order_thread, (void *)i);
}

#endif
