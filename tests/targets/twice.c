/* Shared memory that is mapped twice, back to back, as ring buffers are, and written to through both mappings.
 * usage: twice WORDS */
#include "target.h"

enum { SIZE = 64 * 4096 };

int main(int argc, char **argv) {
    (void)argc;
    open_words(argv[1]);
    int fd = memfd_create("ring", 0);
    if (ftruncate(fd, SIZE))
        return 3;
    char *at = mmap(0, 2 * SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 2; i++)
        if (mmap(at + i * SIZE, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
            return 3;
    for (int i = 0; i < SIZE; i += 4096)
        at[i] = at[i + SIZE + 1] = i / 4096 + 1;
    words[COUNTERS] = (uint64_t)at;
    words[COUNTERS + 1] = (uint64_t)at + SIZE;
    words[READY] = 1;
    for (;;) {
        at[64] ^= 1;
        at[SIZE + 4096 + 64] ^= 1;
        usleep(100);
    }
}
