/* Threads that compute in general, SSE and x87 registers, check themselves, and write pages.
 *
 * usage: compute WORDS THREADS [leave] [linger] [notrap] [avx]
 * leave: the leader thread ends; linger: it ends once VALUES is not 0; notrap: SIGTRAP is ignored, and must stay
 * ignored; avx: ymm registers too */
#include "target.h"
#include <pthread.h>
#include <string.h>

enum { N_PAGES = 256 };
static int with_avx;
static unsigned char *memory;

/* 1000 rounds of an LCG, in registers only; the expected value is from a run without a stop. */
static uint64_t general(uint64_t seed) {
    uint64_t a = seed, b = seed ^ 0x9E3779B97F4A7C15, rounds = 1000;
    __asm__ volatile("1: imul %3, %0\n\tadd %1, %0\n\trol $7, %1\n\txor %0, %1\n\tdec %2\n\tjnz 1b"
                     : "+r"(a), "+r"(b), "+r"(rounds)
                     : "r"(6364136223846793005ull)
                     : "cc");
    return a ^ b;
}

static uint64_t sse(uint64_t seed) {
    uint64_t rounds = 1000, result;
    __asm__ volatile("movq %2, %%xmm5\n\tmovq %2, %%xmm11\n\tpaddq %%xmm5, %%xmm11\n"
                     "1: paddq %%xmm11, %%xmm5\n\tpsllq $1, %%xmm11\n\tpxor %%xmm5, %%xmm11\n"
                     "\tdec %1\n\tjnz 1b\n\tmovq %%xmm11, %0"
                     : "=r"(result), "+r"(rounds)
                     : "r"(seed)
                     : "xmm5", "xmm11", "cc");
    return result;
}

static uint64_t avx(uint64_t seed) {
    uint64_t rounds = 1000, lanes[4] = {seed, seed + 1, seed + 2, seed + 3};
    __asm__ volatile("vmovdqu (%1), %%ymm13\n"
                     "1: vpsrlq $3, %%ymm13, %%ymm14\n\tvpaddq %%ymm14, %%ymm13, %%ymm13\n"
                     "\tdec %0\n\tjnz 1b\n\tvmovdqu %%ymm13, (%1)\n\tvzeroupper"
                     : "+r"(rounds)
                     : "r"(lanes)
                     : "xmm13", "xmm14", "cc", "memory");
    return lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3];
}

static double x87(uint64_t seed) {
    long double value = (long double)seed;
    for (int i = 0; i < 300; i++)
        value = value * 1.0000001L + 3.5L;
    return (double)value;
}

static void *work(void *arg) {
    uint64_t me = (uint64_t)arg, seed = me * 77 + 5;
    uint64_t expected = general(seed), expected_sse = sse(seed), expected_avx = with_avx ? avx(seed) : 0;
    double expected_x87 = x87(seed);
    for (uint64_t n = 0;; n++) {
        uint64_t wrong = general(seed) != expected;
        wrong += sse(seed) != expected_sse;
        wrong += with_avx && avx(seed) != expected_avx;
        wrong += x87(seed) != expected_x87;
        if (wrong)
            words[ERRORS] += wrong;
        memory[(n % N_PAGES) * 4096 + me]++;
        words[COUNTERS + me]++;
    }
    return 0;
}

/* A forced SIGTRAP would reset the handler. */
static void *watch_trap(void *arg) {
    for (;;) {
        struct sigaction now;
        sigaction(SIGTRAP, 0, &now);
        if (now.sa_handler != SIG_IGN)
            words[ERRORS] += 1000;
        usleep(2000);
    }
    return arg;
}

int main(int argc, char **argv) {
    int leave = 0, linger = 0, threads = atoi(argv[2]);
    pthread_t thread;
    open_words(argv[1]);
    memory = mmap(0, N_PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(memory, N_PAGES * 4096, MADV_NOHUGEPAGE);
    for (int page = 0; page < N_PAGES; page++)
        memory[page * 4096 + 4000] = 1;
    words[MEMORY] = (uint64_t)memory;
    words[PAGES] = N_PAGES;
    for (int i = 3; i < argc; i++) {
        leave |= !strcmp(argv[i], "leave");
        linger |= !strcmp(argv[i], "linger");
        with_avx |= !strcmp(argv[i], "avx");
        if (!strcmp(argv[i], "notrap")) {
            signal(SIGTRAP, SIG_IGN);
            pthread_create(&thread, 0, watch_trap, 0);
        }
    }
    for (int i = leave ? 0 : 1; i < threads; i++)
        pthread_create(&thread, 0, work, (void *)(uint64_t)i);
    words[READY] = 1;
    while (linger && !words[VALUES])
        usleep(1000);
    if (leave)
        pthread_exit(0);
    work(0);
    return 0;
}
