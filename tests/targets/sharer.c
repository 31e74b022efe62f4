/* A process whose memory other processes share and write to.
 *
 * usage: sharer WORDS share|threads|vfork|churn|maps. COUNTERS: the main thread's, then the others'; VALUES: the process
 * that shares the memory; MEMORY: a page of anonymous memory; PAGES: one of .data; it writes to both in turn.
 * maps: MEMORY is four pages of data, four unmapped pages, four of data. When the last word is 1, the other process
 * maps memory into the gap; when it is 2, a file over the second page. Then it sets that word to 3. */
#include "target.h"
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/wait.h>

enum { STACK = 65536, PAGE = 4096 };
static struct {
    volatile uint64_t n;
    char rest[4088];
} in_data __attribute__((aligned(4096))) = {1, {1}};
static volatile uint64_t *in_anon;
static char stacks[64][STACK] __attribute__((aligned(16)));

static void count(int counter) {
    for (uint64_t n = 1;; n++) {
        in_anon[0] = n;
        in_data.n = n;
        words[COUNTERS + counter]++;
    }
}

static int write_in_turn(void *arg) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    count((int)(intptr_t)arg);
    return 0;
}

static int just_count(void *arg) {
    for (;;)
        words[COUNTERS + (int)(intptr_t)arg]++;
    return 0;
}

static int map_in_between(void *arg) {
    char *at = (char *)(uintptr_t)words[MEMORY];
    int fd = open("/proc/self/exe", O_RDONLY);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (!words[WORDS - 1])
        usleep(100);
    if (words[WORDS - 1] == 1)
        *(char *)mmap(at + 4 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                      0) = 1;
    else if (mmap(at + PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 0) == MAP_FAILED)
        _exit(3);
    words[WORDS - 1] = 3;
    return just_count(arg);
}

/* The other process has a thread too, made by clone(2), since pthreads work in one process only. */
static int write_with_a_thread(void *arg) {
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (clone(just_count, stacks[2] + STACK - 64, flags, (void *)2) < 0)
        _exit(3);
    return write_in_turn(arg);
}

static int live_shortly(void *arg) {
    for (volatile int i = 0; i < 20000; i++)
        words[COUNTERS + 1]++;
    (void)arg;
    return 0;
}

/* There are always some of them, and new ones keep appearing. */
static void churn(void) {
    pid_t living[32] = {0};
    for (unsigned n = 0;; n++) {
        int i = n % 32;
        if (living[i] && waitpid(living[i], 0, __WALL) != living[i])
            words[ERRORS]++;
        living[i] = clone(live_shortly, stacks[i] + STACK - 64, CLONE_VM | (n & 1 ? SIGCHLD : 0), 0);
        if (living[i] < 0)
            words[ERRORS]++;
        words[COUNTERS]++;
    }
}

/* A thread (clone(2), no pthread: they share the stack protector's canary) that waits for its vfork. */
static int wait_for_vfork(void *arg) {
    pid_t child = vfork();
    (void)arg;
    if (child == 0) {
        words[VALUES] = (uint64_t)getpid();
        while (!words[WORDS - 1])
            words[COUNTERS + 1]++;
        _exit(0);
    }
    for (;;)
        words[COUNTERS + 2]++;
}

int main(int argc, char **argv) {
    const char *mode = argv[argc - 1];
    int threads = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
    open_words(argv[1]);
    if (!strcmp(mode, "maps")) {
        char *at = mmap(0, 12 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        for (int i = 0; i < 12; i++)
            at[i * PAGE] = (char)(i + 1);
        munmap(at + 4 * PAGE, 4 * PAGE);
        in_anon = (volatile uint64_t *)at;
    } else
        in_anon = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    words[MEMORY] = (uint64_t)in_anon;
    words[PAGES] = (uint64_t)&in_data;
    words[READY] = 1;
    if (!strcmp(mode, "churn"))
        churn();
    if (!strcmp(mode, "vfork")) {
        if (clone(wait_for_vfork, stacks[0] + STACK - 64, threads, 0) < 0)
            return 3;
    } else {
        int (*body)(void *) = strcmp(mode, "threads") ? write_in_turn : write_with_a_thread;
        if (!strcmp(mode, "maps"))
            body = map_in_between;
        int child = clone(body, stacks[1] + STACK - 64, CLONE_VM | CLONE_FILES | SIGCHLD, (void *)1);
        if (child < 0)
            return 3;
        words[VALUES] = (uint64_t)child;
    }
    for (;;) {
        words[COUNTERS]++;
        usleep(100);
    }
}
