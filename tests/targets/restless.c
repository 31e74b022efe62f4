/* Threads that write in a known order while others keep changing the mappings.
 *
 * usage: restless WORDS KIND THREADS PAGES STRIDE HOW; HOW: malloc, mmap, dontneed, mremap, fork, families, brk, sleepers
 * COUNTERS: of the writers; COUNTERS + 16 + i: of the others, which also check what they have written.
 * REFUSED: EFAULT of mremap. */
#include "order.h"
#include <errno.h>
#include <sys/wait.h>

enum { OTHERS = 16, SLEEPERS = 63, N_OTHERS = 5, REFUSED = 6 };

static void fill(volatile uint64_t *memory, uint64_t bytes, uint64_t value) {
    for (uint64_t i = 0; i < bytes / 8; i += 64)
        memory[i] = value + i;
}

static void check(volatile uint64_t *memory, uint64_t bytes, uint64_t value) {
    for (uint64_t i = 0; i < bytes / 8; i += 64)
        if (memory[i] != value + i)
            words[ERRORS]++;
}

static uint64_t next(uint64_t *seed) {
    *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
    return *seed >> 33;
}

static void *do_malloc(void *arg) {
    uint64_t me = (uint64_t)arg, seed = me, sizes[64] = {0};
    void *blocks[64] = {0};
    for (uint64_t n = 0;; n++) {
        uint64_t i = next(&seed) % 64;
        if (blocks[i])
            check(blocks[i], sizes[i], me + i);
        free(blocks[i]);
        sizes[i] = n % 50 ? 512 + next(&seed) % 20000 / 8 * 8 : 512 << 10;
        blocks[i] = malloc(sizes[i]);
        fill(blocks[i], sizes[i], me + i);
        words[COUNTERS + OTHERS + me]++;
    }
    return arg;
}

static void *do_mmap(void *arg) {
    uint64_t me = (uint64_t)arg, seed = me;
    for (;;) {
        uint64_t bytes = (1 + next(&seed) % 64) * 4096;
        char *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        fill((void *)memory, bytes, seed);
        check((void *)memory, bytes, seed);
        munmap(memory, bytes / 8192 * 4096);
        munmap(memory + bytes / 8192 * 4096, bytes - bytes / 8192 * 4096);
        words[COUNTERS + OTHERS + me]++;
    }
    return arg;
}

static void *do_dontneed(void *arg) {
    uint64_t me = (uint64_t)arg, seed = me, bytes = 2 << 20;
    char *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (;;) {
        uint64_t part = next(&seed) % 256 * 4096;
        fill((void *)memory, bytes, seed);
        madvise(memory + part, bytes / 2, MADV_DONTNEED);
        check((void *)memory, part, seed);
        if (memory[part] || memory[part + bytes / 2 - 1])
            words[ERRORS]++;
        words[COUNTERS + OTHERS + me]++;
    }
    return arg;
}

static void *do_mremap(void *arg) {
    uint64_t me = (uint64_t)arg, seed = me, bytes = 64 * 4096;
    char *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fill((void *)memory, bytes, me);
    for (;;) {
        uint64_t now = (32 + next(&seed) % 96) * 4096;
        char *moved = mremap(memory, bytes, now, MREMAP_MAYMOVE);
        if (moved == MAP_FAILED) {
            if (errno != EFAULT)
                exit(7);
            words[REFUSED]++;
            continue;
        }
        memory = moved;
        check((void *)memory, now < bytes ? now : bytes, me);
        fill((void *)memory, now, me);
        bytes = now;
        words[COUNTERS + OTHERS + me]++;
    }
    return arg;
}

static void *do_fork(void *arg) {
    uint64_t me = (uint64_t)arg;
    for (;;) {
        int status = 0;
        pid_t child = fork();
        if (child == 0) {
            order_memory[3] = 7; /* its own copy; if the memory is shared, this word is not checked */
            _exit(7);
        }
        if (child < 0 || waitpid(child, &status, 0) != child || WEXITSTATUS(status) != 7)
            words[ERRORS]++;
        words[COUNTERS + OTHERS + me]++;
    }
    return arg;
}

/* A child that forks at once; both processes write. */
static void *do_families(void *arg) {
    uint64_t me = (uint64_t)arg;
    for (;;) {
        int status = 0;
        pid_t child = fork();
        if (child == 0) {
            pid_t grandchild = fork();
            order_memory[4 + me] = 7;
            if (grandchild == 0)
                _exit(7);
            if (grandchild < 0 || waitpid(grandchild, &status, 0) != grandchild)
                _exit(8);
            _exit(WEXITSTATUS(status));
        }
        if (child < 0 || waitpid(child, &status, 0) != child || WEXITSTATUS(status) != 7)
            words[ERRORS]++;
        words[COUNTERS + OTHERS + me]++;
    }
    return arg;
}

/* Only one thread does this, and no other thread calls malloc meanwhile. */
static void *do_brk(void *arg) {
    uint64_t me = (uint64_t)arg;
    for (uint64_t n = 0;; n++) {
        char *memory = sbrk(64 * 4096);
        fill((void *)memory, 64 * 4096, n);
        check((void *)memory, 64 * 4096, n);
        if (n % 64 == 63)
            sbrk(-64 * 64 * 4096);
        words[COUNTERS + OTHERS + me]++;
    }
    return arg;
}

static void *do_sleep(void *arg) {
    uint64_t me = (uint64_t)arg;
    for (;;) {
        usleep(1000 + 100 * me);
        words[COUNTERS + OTHERS + me]++;
    }
    return arg;
}

static const struct {
    const char *name;
    void *(*run)(void *);
    int threads;
} ways[] = {{"malloc", do_malloc, 8}, {"mmap", do_mmap, 2}, {"dontneed", do_dontneed, 2}, {"mremap", do_mremap, 2},
            {"fork", do_fork, 2},     {"families", do_families, 3}, {"brk", do_brk, 1},   {"sleepers", do_sleep, SLEEPERS}};

int main(int argc, char **argv) {
    pthread_t thread;
    if (argc != 7)
        return 1;
    open_words(argv[1]);
    order_begin(argv[2], atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
    for (unsigned i = 0; i < sizeof ways / sizeof *ways; i++)
        for (int j = 0; !strcmp(ways[i].name, argv[6]) && j < ways[i].threads; j++, words[N_OTHERS]++)
            pthread_create(&thread, 0, ways[i].run, (void *)(uint64_t)j);
    words[READY] = 1;
    for (;;)
        pause();
}
