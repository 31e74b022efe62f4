/* A thread on a small stack inside an array, as coroutines have: the memory below its stack pointer belongs to
 * another thread, which writes to it and checks that nothing else does. No other memory of the program changes.
 *
 * usage: smallstack WORDS [SPARE [SPACE]]: SPARE free descriptors, at most SPACE bytes of address space. MEMORY: the
 * array; VALUES: the copy that the other thread compares with; PAGES of each */
#include "target.h"
#include <pthread.h>
#include <sys/resource.h>

enum { N_PAGES = 4, N_WORDS = N_PAGES * 512, TOP = N_WORDS / 2, BELOW = 400 };
static uint64_t array[N_WORDS] __attribute__((aligned(4096)));
static uint64_t remembered[N_WORDS] __attribute__((aligned(4096)));

/* Below the stack and its red zone of 128 bytes are words of this thread. */
static void *count(void *arg) {
    volatile uint64_t *mine = &array[TOP - 2 - 16 - BELOW];
    for (uint64_t n = 0;; n++) {
        uint64_t wrong = 0;
        for (int i = 0; i < BELOW; i++) {
            wrong += mine[i] != remembered[i];
            mine[i] = remembered[i] = n + (uint64_t)i;
        }
        if (wrong)
            words[ERRORS] += wrong;
        words[COUNTERS]++;
    }
    return arg;
}

static void limit(int what, rlim_t value) {
    struct rlimit both = {value, value};
    if (setrlimit(what, &both))
        exit(3);
}

int main(int argc, char **argv) {
    pthread_t thread;
    open_words(argv[1]);
    words[MEMORY] = (uint64_t)array;
    words[VALUES] = (uint64_t)remembered;
    words[PAGES] = N_PAGES;
    pthread_create(&thread, 0, count, 0);
    if (argc > 2)
        limit(RLIMIT_NOFILE, 3 + strtoul(argv[2], 0, 10));
    if (argc > 3)
        limit(RLIMIT_AS, strtoul(argv[3], 0, 10));
    words[READY] = 1;
    __asm__ volatile("mov %0, %%rsp\n1: pause\n jmp 1b" ::"r"(&array[TOP - 2]) : "memory");
    __builtin_unreachable();
}
