/* Memory of known content, a part of which is unmapped, discarded or changed when the test says so.
 *
 * usage: victim WORDS KIND PAGES; KIND: anon, memfd, hugetlb (a memfd of huge pages), private (a private mapping of
 * a memfd, whose file holds other values). Page i holds i + 1 in its words 0 and 511; of anon memory the first 16
 * pages are PROT_NONE, of shared memory they are zero. VALUES: an action (enum deed) on the pages FIRST ...
 * FIRST + COUNT; it is 0 again once that is done. Then the memory that is mapped there is written to. COUNTERS
 * increases while it runs. */
#include "target.h"
#include <errno.h>
#include <pthread.h>
#include <string.h>

enum { FIRST = 5, COUNT = 6, PAGE = 4096, HIDDEN = 16, ROOM = 512 };
enum deed { UNMAP = 1, REPLACE, DISCARD, PUNCH, TRUNCATE, MOVE, GROW, MAP_A_FILE, REWRITE, REMOVE, WRITE, MAP_AGAIN, EXTEND, TOUCH };

static char *memory;
static uint64_t pages, extended;
static int fd = -1;
static uint64_t unit = PAGE;

static void write_pages(char *start, uint64_t count, uint64_t value) {
    for (uint64_t i = 0; i < count; i++) {
        uint64_t *page = (uint64_t *)(start + i * PAGE);
        page[0] = page[511] = value ? value : i + 1;
    }
}

static void require(int condition) {
    if (!condition)
        words[ERRORS] += 1000000 + (uint64_t)errno;
}

static void unmap(char *part, uint64_t bytes) { require(munmap(part, bytes) == 0); }

static void replace(char *part, uint64_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    require(mmap(part, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) == part);
}

static void map_a_file(char *part, uint64_t bytes) {
    int program = open("/proc/self/exe", O_RDONLY);
    require(mmap(part, bytes, PROT_READ, MAP_PRIVATE | MAP_FIXED, program, 0) == part);
    close(program);
}

static void move(char *part, uint64_t bytes) {
    char *place = mmap(0, bytes + unit, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    place += -(uint64_t)place & (unit - 1);
    require(mremap(part, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
    write_pages(place, bytes / PAGE, 99);
}

/* All readable memory, in one call. */
static void grow(void) {
    uint64_t bytes = (pages + extended - HIDDEN) * PAGE;
    char *moved = mremap(memory + HIDDEN * PAGE, bytes, bytes + 512 * PAGE, MREMAP_MAYMOVE);
    require(moved != MAP_FAILED);
    for (uint64_t i = 0; moved != MAP_FAILED && i < pages - HIDDEN; i++)
        require(*(uint64_t *)(moved + i * PAGE) == i + HIDDEN + 1);
}

static void punch(uint64_t offset, uint64_t bytes) {
    require(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) == 0);
}

/* Keeps the time short in which the file holds less than before. */
static void rewrite(uint64_t offset, uint64_t bytes) {
    for (uint64_t end = offset + bytes; offset < end; offset += unit) {
        punch(offset, unit);
        write_pages(memory + offset, unit / PAGE, 77);
    }
}

/* In place: the mapping keeps its address and ends later than before. */
static void extend(void) {
    uint64_t bytes = (pages - HIDDEN) * PAGE;
    extended = ROOM / 2;
    require(mremap(memory + HIDDEN * PAGE, bytes, bytes + extended * PAGE, 0) != MAP_FAILED);
    write_pages(memory + pages * PAGE, extended, 5);
}

static void act(enum deed deed) {
    uint64_t offset = words[FIRST] * PAGE, bytes = words[COUNT] * PAGE;
    char *part = memory + offset;
    if (deed == UNMAP)
        unmap(part, bytes);
    if (deed == REPLACE)
        replace(part, bytes);
    if (deed == DISCARD)
        require(madvise(part, bytes, MADV_DONTNEED) == 0);
    if (deed == PUNCH)
        punch(offset, bytes);
    if (deed == TRUNCATE)
        require(ftruncate(fd, (off_t)offset) == 0);
    if (deed == MOVE)
        move(part, bytes);
    if (deed == GROW)
        grow();
    if (deed == EXTEND)
        extend();
    for (uint64_t i = 0; deed == TOUCH && i < words[COUNT]; i += 8)
        write_pages(part + i * PAGE, 1, 55);
    if (deed == MAP_A_FILE)
        map_a_file(part, bytes);
    if (deed == REWRITE)
        rewrite(offset, bytes);
    if (deed == REMOVE)
        require(madvise(part, bytes, MADV_REMOVE) == 0);
    if (deed == WRITE)
        require(pwrite(fd, "later", 5, (off_t)offset) == 5);
    if (deed == MAP_AGAIN)
        require(mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset) != MAP_FAILED);
}

static int writable_after(enum deed deed) { return deed == REPLACE || deed == DISCARD || deed == PUNCH; }

static void *heart(void *arg) {
    for (;;) {
        words[COUNTERS]++;
        usleep(200);
    }
    return arg;
}

static void map(const char *kind) {
    int huge = !strcmp(kind, "hugetlb"), own = !strcmp(kind, "private");
    int flags = own || !strcmp(kind, "anon") ? MAP_PRIVATE : MAP_SHARED;
    if (strcmp(kind, "anon")) {
        fd = memfd_create("victim", huge ? MFD_HUGETLB : 0);
        require(ftruncate(fd, (off_t)(pages * PAGE)) == 0);
    } else
        flags |= MAP_ANONYMOUS;
    for (uint64_t i = 0; own && i < pages; i++)
        require(pwrite(fd, "file", 4, (off_t)(i * PAGE)) == 4);
    memory = mmap(0, (pages + (fd < 0 ? ROOM : 0)) * PAGE, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (memory == MAP_FAILED)
        exit(6);
    if (fd < 0)
        munmap(memory + pages * PAGE, ROOM * PAGE);
    unit = huge ? 2 << 20 : PAGE;
    if (!huge)
        madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
    write_pages(memory, pages, 0);
    if (fd < 0)
        require(mprotect(memory, HIDDEN * PAGE, PROT_NONE) == 0);
    else if (!own)
        memset(memory, 0, HIDDEN * PAGE);
}

int main(int argc, char **argv) {
    pthread_t thread;
    if (argc != 4)
        return 1;
    open_words(argv[1]);
    pages = strtoul(argv[3], 0, 10);
    map(argv[2]);
    words[MEMORY] = (uint64_t)memory;
    words[PAGES] = pages;
    pthread_create(&thread, 0, heart, 0);
    words[READY] = 1;
    for (;;) {
        enum deed deed = (enum deed)words[VALUES];
        if (deed) {
            act(deed);
            words[VALUES] = 0;
            if (writable_after(deed))
                write_pages(memory + words[FIRST] * PAGE, words[COUNT], 77);
        }
        usleep(200);
    }
}
