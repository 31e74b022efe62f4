/* One mapping of each kind that this kernel can make, in use, with known content.
 *
 * usage: mappings WORDS DISK TMPFS HUGETLBFS KIND...
 * DISK, TMPFS, HUGETLBFS: directories on such a file system, or "-". words[COUNTERS + i]: the address of the i-th
 * kind, 0 if it cannot be made. Each word of the memory is (i << 32) + its number. */
#include "target.h"
#include <errno.h>
#include <linux/perf_event.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/shm.h>
#include <sys/syscall.h>

enum { PAGE = 4096, SIZE = 8 * PAGE, HUGE = 2 << 20 };
enum { GUARD_INSTALL = 102, WIPEONFORK = 18, PAGEOUT = 21, DROPPABLE = 8, SECRET = 447, MSEAL = 462 };
static const char *disk, *tmpfs, *hugetlbfs;
static uint64_t number;

static void *fill(void *at, size_t size) {
    uint64_t *word = at;
    for (size_t i = 0; i < size / 8; i++)
        word[i] = (number << 32) + i;
    return at;
}

static void *map(size_t size, int prot, int flags, int fd) {
    /* With a gap around it, so that each kind is a mapping of its own. */
    size_t align = size == HUGE ? HUGE : PAGE;
    char *room = mmap(0, size + 2 * align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *place = (char *)(((uintptr_t)room + align) & -align);
    void *at = mmap(place, size, prot, flags | MAP_FIXED, fd, 0);
    munmap(room, place - room);
    munmap(place + size, room + size + 2 * align - (place + size));
    return at == MAP_FAILED ? 0 : at;
}

static void *plain(void) {
    void *at = map(SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    return at ? fill(at, SIZE) : 0;
}

static void *advised(int advice) {
    void *at = plain();
    return madvise(at, SIZE, advice) ? 0 : at;
}

static void *protected(int prot) {
    void *at = plain();
    return mprotect(at, SIZE, prot) ? 0 : at;
}

/* A file of `size` bytes with the content, open for reading and writing. */
static int file_in(const char *folder, const char *name, size_t size, int removed) {
    char path[4096];
    if (*folder == '-')
        return -1;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || ftruncate(fd, size))
        return -1;
    void *at = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return -1;
    munmap(fill(at, size), size);
    if (removed)
        unlink(path);
    return fd;
}

static void *of_file(int fd, size_t size, int prot, int flags) { return fd < 0 ? 0 : map(size, prot, flags, fd); }

static int memory_file(unsigned flags, size_t size) {
    int fd = memfd_create("kind", flags);
    return fd < 0 || ftruncate(fd, size) ? -1 : fd;
}

static void *written(void *at, size_t size) { return at ? fill(at, size) : 0; }

static void *guard(void) {
    char *at = map(SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    fill(at, SIZE);
    return madvise(at, 2 * PAGE, GUARD_INSTALL) ? 0 : at;
}

static void *guard_shared(void) {
    char *at = written(of_file(memory_file(0, SIZE), SIZE, PROT_READ | PROT_WRITE, MAP_SHARED), SIZE);
    return madvise(at, 2 * PAGE, GUARD_INSTALL) ? 0 : at;
}

static void *guard_private(void) {
    char *at = of_file(memory_file(0, SIZE), SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
    fill(at, SIZE);
    return madvise(at, 2 * PAGE, GUARD_INSTALL) ? 0 : at;
}

static void *sysv(void) {
    int id = shmget(IPC_PRIVATE, SIZE, IPC_CREAT | 0600);
    void *at = shmat(id, 0, 0);
    shmctl(id, IPC_RMID, 0);
    return at == (void *)-1 ? 0 : fill(at, SIZE);
}

static void *secret(void) {
    int fd = syscall(SECRET, 0);
    return fd < 0 || ftruncate(fd, SIZE) ? 0 : written(map(SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd), SIZE);
}

static void *uring(void) {
    char parameters[120] = {0};
    int fd = syscall(SYS_io_uring_setup, 4, parameters);
    void *at = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0); /* it accepts no address */
    return fd < 0 || at == MAP_FAILED ? 0 : at;
}

static void *aio(void) {
    unsigned long context = 0;
    return syscall(SYS_io_setup, 8, &context) ? 0 : (void *)context;
}

static void *perf(void) {
    struct perf_event_attr attr = {.type = PERF_TYPE_SOFTWARE, .size = sizeof attr, .config = PERF_COUNT_SW_DUMMY};
    int fd = syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
    return fd < 0 ? 0 : map(2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
}

static void *key(void) {
    void *at = plain();
    int one = pkey_alloc(0, PKEY_DISABLE_ACCESS);
    return one < 0 || pkey_mprotect(at, SIZE, PROT_READ | PROT_WRITE, one) ? 0 : at;
}

static void *huge_page(void) {
    char *room = mmap(0, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *at = (char *)(((uintptr_t)room + HUGE - 1) & -(uintptr_t)HUGE);
    return madvise(at, HUGE, MADV_HUGEPAGE) ? 0 : fill(at, HUGE);
}

static void *read_only_data(void) {
    void *at = of_file(file_in(disk, "relro", SIZE, 0), SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE);
    if (!at)
        return 0;
    fill(at, PAGE);
    return mprotect(at, SIZE, PROT_READ) ? 0 : at;
}

static void *make(const char *kind) {
    const int rw = PROT_READ | PROT_WRITE;
    if (!strcmp(kind, "anonymous")) return plain();
    if (!strcmp(kind, "thp")) return huge_page();
    if (!strcmp(kind, "guard")) return guard();
    if (!strcmp(kind, "guard-shared")) return guard_shared();
    if (!strcmp(kind, "guard-memfd-private")) return guard_private();
    if (!strcmp(kind, "droppable")) return written(map(SIZE, rw, DROPPABLE | MAP_ANONYMOUS, -1), SIZE);
    if (!strcmp(kind, "mseal")) { void *at = plain(); return syscall(MSEAL, at, SIZE, 0) ? 0 : at; }
    if (!strcmp(kind, "pkey")) return key();
    if (!strcmp(kind, "locked")) { void *at = plain(); return mlock(at, SIZE) ? 0 : at; }
    if (!strcmp(kind, "dontdump")) return advised(MADV_DONTDUMP);
    if (!strcmp(kind, "dontfork")) return advised(MADV_DONTFORK);
    if (!strcmp(kind, "wipeonfork")) return advised(WIPEONFORK);
    if (!strcmp(kind, "merged")) return advised(MADV_MERGEABLE);
    if (!strcmp(kind, "swapped")) return advised(PAGEOUT);
    if (!strcmp(kind, "growsdown"))
        return written(map(SIZE, rw, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN, -1), SIZE);
    if (!strcmp(kind, "none")) return protected(PROT_NONE);
    if (!strcmp(kind, "readonly")) return protected(PROT_READ);
    if (!strcmp(kind, "execonly")) return protected(PROT_EXEC);
    if (!strcmp(kind, "devzero-private")) return written(map(SIZE, rw, MAP_PRIVATE, open("/dev/zero", O_RDWR)), PAGE);
    if (!strcmp(kind, "devzero-shared")) return written(map(SIZE, rw, MAP_SHARED, open("/dev/zero", O_RDWR)), SIZE);
    if (!strcmp(kind, "shared-anonymous")) return written(map(SIZE, rw, MAP_SHARED | MAP_ANONYMOUS, -1), SIZE);
    if (!strcmp(kind, "memfd")) return written(of_file(memory_file(0, SIZE), SIZE, rw, MAP_SHARED), SIZE);
    if (!strcmp(kind, "memfd-private")) return written(of_file(memory_file(0, SIZE), SIZE, rw, MAP_PRIVATE), SIZE);
    if (!strcmp(kind, "memfd-short")) return written(of_file(memory_file(0, 2 * PAGE), SIZE, rw, MAP_SHARED), 2 * PAGE);
    if (!strcmp(kind, "memfd-short-private"))
        return written(of_file(memory_file(0, 2 * PAGE), SIZE, rw, MAP_PRIVATE), 2 * PAGE);
    if (!strcmp(kind, "memfd-readonly")) {
        int fd = memory_file(0, SIZE);
        munmap(written(of_file(fd, SIZE, rw, MAP_SHARED), SIZE), SIZE);
        return of_file(fd, SIZE, PROT_READ, MAP_SHARED);
    }
    if (!strcmp(kind, "memfd-none")) {
        void *at = written(of_file(memory_file(0, SIZE), SIZE, rw, MAP_SHARED), SIZE);
        return mprotect(at, SIZE, PROT_NONE) ? 0 : at;
    }
    if (!strcmp(kind, "hugetlb")) return written(map(HUGE, rw, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1), HUGE);
    if (!strcmp(kind, "hugetlb-file")) return of_file(file_in(hugetlbfs, "kept", HUGE, 0), HUGE, rw, MAP_SHARED);
    if (!strcmp(kind, "hugetlb-file-private"))
        return of_file(file_in(hugetlbfs, "private", HUGE, 0), HUGE, rw, MAP_PRIVATE);
    if (!strcmp(kind, "tmpfs")) return of_file(file_in(tmpfs, "kept", SIZE, 0), SIZE, rw, MAP_SHARED);
    if (!strcmp(kind, "tmpfs-removed")) return of_file(file_in(tmpfs, "removed", SIZE, 1), SIZE, rw, MAP_SHARED);
    if (!strcmp(kind, "tmpfs-private"))
        return written(of_file(file_in(tmpfs, "private", SIZE, 0), SIZE, rw, MAP_PRIVATE), SIZE);
    if (!strcmp(kind, "tmpfs-text")) return of_file(file_in(tmpfs, "text", SIZE, 0), SIZE, PROT_READ, MAP_PRIVATE);
    if (!strcmp(kind, "file-shared")) return of_file(file_in(disk, "kept", SIZE, 0), SIZE, rw, MAP_SHARED);
    if (!strcmp(kind, "file-shared-removed")) return of_file(file_in(disk, "gone", SIZE, 1), SIZE, rw, MAP_SHARED);
    if (!strcmp(kind, "file-private"))
        return written(of_file(file_in(disk, "data", SIZE, 0), SIZE, rw, MAP_PRIVATE), PAGE);
    if (!strcmp(kind, "file-private-removed"))
        return written(of_file(file_in(disk, "lost", SIZE, 1), SIZE, rw, MAP_PRIVATE), PAGE);
    if (!strcmp(kind, "file-relro")) return read_only_data();
    if (!strcmp(kind, "file-text")) return of_file(file_in(disk, "text", SIZE, 0), SIZE, PROT_READ, MAP_PRIVATE);
    if (!strcmp(kind, "file-text-removed")) {
        void *at = of_file(file_in(disk, "old", SIZE, 1), SIZE, PROT_READ | PROT_EXEC, MAP_PRIVATE);
        return at;
    }
    if (!strcmp(kind, "sysv")) return sysv();
    if (!strcmp(kind, "secret")) return secret();
    if (!strcmp(kind, "io_uring")) return uring();
    if (!strcmp(kind, "aio")) return aio();
    if (!strcmp(kind, "perf")) return perf();
    exit(3);
}

int main(int argc, char **argv) {
    open_words(argv[1]);
    disk = argv[2];
    tmpfs = argv[3];
    hugetlbfs = argv[4];
    for (int i = 5; i < argc; i++) {
        number = i - 4;
        words[COUNTERS + number] = (uint64_t)make(argv[i]);
    }
    words[READY] = 1;
    for (;;)
        pause();
}
