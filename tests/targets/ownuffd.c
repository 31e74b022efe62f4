/* A program that fills a mapping through its own userfaultfd, page by page. usage: ownuffd WORDS
 *
 * words[COUNTERS]: pages touched; [COUNTERS + 1]: the mapping; [COUNTERS + 2]: plain memory, whose first word is 7. */
#include "target.h"
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

enum { PAGES_IN_IT = 4096, PAGE = 4096, PLAIN = 16 << 20 };
static int fd;

static void *serve(void *argument) {
    (void)argument;
    static char page[PAGE] __attribute__((aligned(PAGE)));
    struct uffd_msg message;
    while (read(fd, &message, sizeof message) == sizeof message) {
        struct uffdio_copy copy = {
            .dst = message.arg.pagefault.address & -PAGE, .src = (uint64_t)page, .len = PAGE};
        ioctl(fd, UFFDIO_COPY, &copy);
    }
    return 0;
}

int main(int argc, char **argv) {
    (void)argc;
    open_words(argv[1]);
    struct uffdio_api api = {.api = UFFD_API};
    fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api))
        return 3;
    char *lazy = mmap(0, PAGES_IN_IT * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register range = {.range = {(uint64_t)lazy, PAGES_IN_IT * PAGE},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    uint64_t *plain = mmap(0, PLAIN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < PLAIN / 8; i += 64)
        plain[i] = i + 7;
    pthread_t thread;
    if (ioctl(fd, UFFDIO_REGISTER, &range) || pthread_create(&thread, 0, serve, 0))
        return 3;
    words[COUNTERS + 1] = (uint64_t)lazy;
    words[COUNTERS + 2] = (uint64_t)plain;
    words[READY] = 1;
    for (uint64_t i = 0;; i++) {
        *(volatile char *)(lazy + i % PAGES_IN_IT * PAGE) += 0;
        words[COUNTERS]++;
        usleep(1000);
    }
}
