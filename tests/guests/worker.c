/* The only program of the Linux guest, its /init: writes to memory and to a disk, and checks both every round.

   From the kernel's command line (init gets unknown parameters as its environment):
     size     MiB of memory to work on
     rate     page writes per second; 0: as many as it can
     batch    page writes per round
     disk     none; exact: the disk holds exactly the records that were acknowledged to this memory;
              atleast: it may also be newer (a machine restored on a disk that was written to after T)

   Write number n fills page n * STRIDE modulo pages with words made of n and the page. So the newest number
   determines every byte of the memory. The check after each round reads all of them, so memory whose pages are
   from different instants fails. It prints "round N ok ..." or, once, "FAIL ..."; it never ends. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, STRIDE = 40503, SLOTS = 64, RECORDS = 4, MAGIC = 0x7265636f };

static uint64_t *memory;
static uint64_t pages, newest;      /* newest: number of the last completed write */
static volatile uint32_t *progress; /* page writes, for the host to sample */
static char *records;               /* SLOTS pages, aligned for O_DIRECT */
static uint64_t acknowledged;       /* number of the last record that the disk has confirmed */
static int disk = -1, exact;

__attribute__((noreturn, format(printf, 1, 2))) static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("FAIL ");
    vprintf(format, arguments);
    printf("\n");
    for (;;)
        pause();
}

static uint64_t setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 0) : otherwise;
}

static uint64_t seed_of(uint64_t n, uint64_t page)
{
    return n * 0x9e3779b97f4a7c15u ^ page * 0xc2b2ae3d27d4eb4fu;
}

static void write_page(uint64_t n)
{
    uint64_t page = n * STRIDE % pages, value = seed_of(n, page), *at = memory + page * WORDS;
    for (int i = 0; i < WORDS; i++, value += 0xff51afd7ed558ccdu)
        at[i] = value;
    newest = n;
    ++*progress;
}

static void check_memory(void)
{
    for (uint64_t n = newest - pages + 1; n <= newest; n++) {
        uint64_t page = n * STRIDE % pages, value = seed_of(n, page), *at = memory + page * WORDS, wrong = 0;
        for (int i = 0; i < WORDS; i++, value += 0xff51afd7ed558ccdu)
            wrong |= at[i] ^ value;
        if (wrong)
            fail("page %llu does not hold write %llu; the newest is %llu", (unsigned long long)page,
                 (unsigned long long)n, (unsigned long long)newest);
    }
}

struct record {
    uint64_t magic, number, words[WORDS - 3], sum;
};

static uint64_t sum_of(const struct record *record)
{
    const uint64_t *words = (const uint64_t *)record;
    uint64_t sum = 0;
    for (int i = 0; i < WORDS - 1; i++)
        sum = (sum ^ words[i]) * 0x100000001b3u;
    return sum;
}

static void write_records(void)
{
    uint64_t last = acknowledged + RECORDS;
    for (uint64_t n = acknowledged + 1; n <= last; n++) {
        struct record *record = (struct record *)records;
        record->magic = MAGIC;
        record->number = n;
        for (int i = 0; i < WORDS - 3; i++)
            record->words[i] = seed_of(n, i);
        record->sum = sum_of(record);
        if (pwrite(disk, record, PAGE, n % SLOTS * PAGE) != PAGE)
            fail("writing record %llu: %s", (unsigned long long)n, strerror(errno));
    }
    if (fdatasync(disk))
        fail("fdatasync: %s", strerror(errno));
    acknowledged = last;
}

static void check_disk(void)
{
    if (pread(disk, records, SLOTS * PAGE, 0) != SLOTS * PAGE)
        fail("reading the disk: %s", strerror(errno));
    for (uint64_t slot = 0; slot < SLOTS; slot++) {
        const struct record *record = (const struct record *)(records + slot * PAGE);
        /* The number of the newest write to this page; 0: none. */
        uint64_t n = slot > acknowledged ? 0 : acknowledged - (acknowledged - slot) % SLOTS;
        if (!n && (!exact || record->magic == 0))
            continue;
        if (record->magic != MAGIC || record->sum != sum_of(record) || record->number % SLOTS != slot)
            fail("the disk does not hold a record where %llu was acknowledged", (unsigned long long)n);
        if (!n || record->number < n || (exact && record->number != n))
            fail("the disk holds record %llu where %llu was acknowledged", (unsigned long long)record->number,
                 (unsigned long long)n);
    }
}

/* Built-in modules are not in the initramfs. The dependencies differ between kernels: a module that lacks symbols
   is tried again after the others. */
static void load_modules(void)
{
    static const char *const names[] = {"virtio", "virtio_ring", "virtio_pci_legacy_dev",
                                        "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"};
    enum { COUNT = sizeof names / sizeof *names };
    int loaded[COUNT] = {0};
    for (int turn = 0; turn < COUNT; turn++)
        for (int i = 0; i < COUNT; i++) {
            char path[64];
            snprintf(path, sizeof path, "/modules/%s.ko", names[i]);
            int fd = loaded[i] ? -1 : open(path, O_RDONLY);
            if (fd < 0)
                continue;
            loaded[i] = !syscall(SYS_finit_module, fd, "", 0);
            if (!loaded[i] && (errno != ENOENT || turn == COUNT - 1))
                fail("loading %s: %s", path, strerror(errno));
            close(fd);
        }
}

static void open_disk(void)
{
    const char *kind = getenv("disk");
    if (!kind || !strcmp(kind, "none"))
        return;
    exact = !strcmp(kind, "exact");
    load_modules();
    for (int i = 0; i < 1000 && disk < 0; i++) { /* the driver may find the disk later */
        disk = open("/dev/vda", O_RDWR | O_DIRECT);
        if (disk < 0)
            usleep(10000);
    }
    if (disk < 0)
        fail("/dev/vda: %s", strerror(errno));
}

static void *locked(size_t bytes)
{
    void *mapped = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED || mlock(mapped, bytes))
        fail("no memory for %zu bytes: %s", bytes, strerror(errno));
    return mapped;
}

/* The address at which the host finds a page: its physical address, from /proc/self/pagemap (proc(5)). */
static uint64_t physical(const volatile void *address)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0 || pread(fd, &entry, 8, (uintptr_t)address / PAGE * 8) != 8 || !(entry >> 63))
        fail("pagemap: %s", strerror(errno));
    close(fd);
    return (entry & ((1ull << 55) - 1)) * PAGE;
}

static void keep_pages_in_place(void)
{
    int fd = open("/proc/sys/vm/compact_unevictable_allowed", O_WRONLY);
    if (fd < 0 || write(fd, "0", 1) != 1)
        fail("compact_unevictable_allowed: %s", strerror(errno));
    close(fd);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void work(uint64_t batch, uint64_t rate)
{
    uint64_t start = now_ns();
    for (uint64_t i = 0; i < batch; i++) {
        write_page(newest + 1);
        while (rate && now_ns() - start < i * 1000000000ull / rate)
            usleep(500);
    }
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (mount("proc", "/proc", "proc", 0, NULL) || mount("dev", "/dev", "devtmpfs", 0, NULL))
        fail("mount: %s", strerror(errno));
    keep_pages_in_place();
    open_disk();
    pages = setting("size", 64) << 20 >> 12;
    memory = locked(pages * PAGE);
    progress = locked(PAGE);
    records = locked(SLOTS * PAGE);
    for (uint64_t n = 0; n < pages; n++)
        write_page(n);
    printf("memory at 0x%llx\n", (unsigned long long)physical(memory));
    printf("progress at 0x%llx\n", (unsigned long long)physical(progress));
    for (uint64_t round = 1;; round++) {
        work(setting("batch", 4096), setting("rate", 0));
        check_memory();
        if (disk >= 0) {
            check_disk();
            write_records();
            check_disk();
        }
        printf("round %llu ok writes=%llu records=%llu\n", (unsigned long long)round, (unsigned long long)newest,
               (unsigned long long)acknowledged);
    }
}
