/* Counts queued signals and sums up their values. usage: signals WORDS busy|epoll|masked
 *
 * COUNTERS: signals handled; VALUES: the sum of their sigqueue(3) values. masked: only epoll_pwait(2) unblocks
 * SIGRTMIN, and must return EINTR for each handler run (else ERRORS). */
#include "target.h"
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>

static void handle(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    words[COUNTERS]++;
    words[VALUES] += (uint64_t)info->si_value.sival_int;
    words[ERRORS] += info->si_code != SI_QUEUE;
}

int main(int argc, char **argv) {
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO};
    int epoll = epoll_create1(0), masked = argc > 2 && !strcmp(argv[2], "masked");
    struct epoll_event event;
    sigset_t inside, queued;
    open_words(argv[1]);
    sigemptyset(&inside);
    sigemptyset(&queued);
    sigaddset(&queued, SIGRTMIN);
    if (masked)
        sigprocmask(SIG_BLOCK, &queued, 0);
    sigaction(SIGRTMIN, &action, 0);
    words[READY] = 1;
    if (argc > 2 && !strcmp(argv[2], "busy"))
        for (volatile uint64_t n = 0;; n++)
            ;
    for (;;) {
        uint64_t before = words[COUNTERS];
        int result = masked ? epoll_pwait(epoll, &event, 1, -1, &inside) : epoll_wait(epoll, &event, 1, -1);
        if (result >= 0 || errno != EINTR)
            words[ERRORS] += 100;
        if (words[COUNTERS] == before)
            words[PAGES]++; /* an EINTR without a signal */
    }
}
