/* Names are bytes: a process, a thread, files and memory files with names that are not valid text.
 *
 * usage: named WORDS KIND TEXT. KIND: process, thread (its name is TEXT), file (a private mapping of the file TEXT, with
 * a page of its own), removed (shared memory of the file TEXT, which is removed), memfd (named TEXT), heap (the heap in
 * three mappings). VALUES and VALUES + 1: address and bytes of memory that is filled with 'n'. */
#include "target.h"
#include <pthread.h>
#include <string.h>
#include <sys/prctl.h>

enum { BYTES = 16 * 4096 };

static void *wait_named(void *name) {
    prctl(PR_SET_NAME, name);
    words[READY] = 1;
    for (;;)
        pause();
    return 0;
}

static char *mapped(int fd, int flags) {
    if (fd >= 0 && ftruncate(fd, BYTES))
        words[ERRORS]++;
    char *memory = mmap(0, BYTES, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (memory == MAP_FAILED)
        words[ERRORS]++;
    return memory;
}

static char *split_heap(void) {
    char *memory = (char *)(((uint64_t)sbrk(BYTES + 4096) + 4095) & ~4095ul);
    memset(memory, 'n', BYTES);
    if (madvise(memory + 4 * 4096, 4 * 4096, MADV_DONTDUMP))
        words[ERRORS]++;
    return memory;
}

int main(int argc, char **argv) {
    if (argc < 4)
        return 2;
    open_words(argv[1]);
    const char *kind = argv[2], *text = argv[3];
    char *memory = 0;
    pthread_t thread;
    if (!strcmp(kind, "heap"))
        memory = split_heap();
    if (!strcmp(kind, "file"))
        memory = mapped(open(text, O_RDWR | O_CREAT, 0600), MAP_PRIVATE);
    if (!strcmp(kind, "removed")) {
        memory = mapped(open(text, O_RDWR | O_CREAT, 0600), MAP_SHARED);
        unlink(text);
    }
    if (!strcmp(kind, "memfd"))
        memory = mapped(memfd_create(text, 0), MAP_SHARED);
    if (!memory)
        memory = mapped(-1, MAP_PRIVATE | MAP_ANONYMOUS);
    memset(memory, 'n', BYTES);
    words[VALUES] = (uint64_t)memory;
    words[VALUES + 1] = BYTES;
    if (!strcmp(kind, "process"))
        prctl(PR_SET_NAME, text);
    if (!strcmp(kind, "thread"))
        pthread_create(&thread, 0, wait_named, argv[3]);
    else
        words[READY] = 1;
    for (;;)
        pause();
}
