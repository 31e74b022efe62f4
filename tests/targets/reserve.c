/* Address space that is reserved and mostly unused, or split into many mappings.
 *
 * usage: reserve WORDS space private|memfd BYTES   data in its first, middle and last page, with their number in each
 *        reserve WORDS many  private|memfd COUNT   COUNT mappings of one page, each with its number; a gap after each
 * MEMORY is the address. VALUES: a command, and 0 once it is done. 1: write to every 64th page of the first
 * half's first 64 MiB; 2: unmap a quarter of it, behind the middle. COUNTERS increases while it runs. */
#include "target.h"
#include <string.h>

enum { PAGE = 4096, STEP = 64 };

static char *map(int shared, size_t size) {
    int fd = shared ? memfd_create("reserve", 0) : -1;
    int flags = shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    if (shared && ftruncate(fd, (off_t)size))
        exit(3);
    char *memory = mmap(0, size, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, fd, 0);
    if (memory == MAP_FAILED)
        exit(4);
    madvise(memory, size, MADV_NOHUGEPAGE);
    return memory;
}

static void mark(char *page, uint64_t value) { *(volatile uint64_t *)page = value; }

static void obey(char *memory, size_t size, uint64_t what) {
    if (what == 1)
        for (size_t at = STEP * PAGE; at < 64 << 20; at += STEP * PAGE)
            mark(memory + at, 9);
    else if (munmap(memory + size / 2 + size / 8, size / 4))
        exit(5);
}

int main(int argc, char **argv) {
    if (argc != 5)
        return 1;
    open_words(argv[1]);
    size_t n = strtoull(argv[4], 0, 0);
    int many = !strcmp(argv[2], "many"), shared = !strcmp(argv[3], "memfd");
    size_t size = many ? n * 2 * PAGE : n;
    char *memory = map(shared, size);
    if (many) {
        for (size_t i = 0; i < n; i++) {
            mark(memory + i * 2 * PAGE, i + 1);
            if (munmap(memory + i * 2 * PAGE + PAGE, PAGE))
                return 6;
        }
    } else {
        mark(memory, 1);
        mark(memory + size / 2, 2);
        mark(memory + size - PAGE, 3);
    }
    words[MEMORY] = (uint64_t)memory;
    for (words[READY] = 1;; usleep(500)) {
        mark(memory + 8, words[COUNTERS]++); /* it keeps writing, but not to the marks */
        if (words[VALUES]) {
            obey(memory, size, words[VALUES]);
            words[VALUES] = 0;
        }
    }
}
