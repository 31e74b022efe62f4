/* Shared by the targets of the attach tests: words that the test reads while they run. */
#ifndef TARGET_H
#define TARGET_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>

/* Words of the memory file whose descriptor argv[1] names, 4096 bytes. */
enum { READY, ERRORS, MEMORY, PAGES, VALUES, COUNTERS = 8, WORDS = 512 };

static _Atomic uint64_t *words;

static inline void open_words(const char *number) {
    int fd = atoi(number);
    words = mmap(0, WORDS * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (words == MAP_FAILED)
        exit(2);
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* a failed test leaves nothing behind */
}

#endif
