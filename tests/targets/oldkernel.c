/* LD_PRELOAD: simulates an older kernel by masking features. Environment:
 *   MASK_IOCTLS    names of ioctls that it does not know: PAGEMAP_SCAN PROCMAP_QUERY
 *   MASK_CALLS     system calls that it refuses, if made by syscall(3): kcmp
 *   MASK_FEATURES  UFFD_FEATURE bits that it does not offer, a number
 *   MASK_RELEASE   the release that uname(2) returns */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/utsname.h>

struct api { uint64_t api, features, ioctls; };
enum { PAGEMAP_SCAN = 0x6610, PROCMAP_QUERY = 0x6611 };
#define UFFDIO_API 0xc018aa3fUL

static int masked(const char *list, const char *name) {
    const char *names = getenv(list);
    return names && strstr(names, name);
}

static uint64_t hidden(void) {
    const char *bits = getenv("MASK_FEATURES");
    return bits ? strtoull(bits, 0, 0) : 0;
}

int ioctl(int fd, unsigned long request, ...) {
    static int (*real)(int, unsigned long, void *);
    unsigned type_and_number = request & 0xffff;
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (!real)
        real = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
    if ((type_and_number == PAGEMAP_SCAN && masked("MASK_IOCTLS", "PAGEMAP_SCAN")) ||
        (type_and_number == PROCMAP_QUERY && masked("MASK_IOCTLS", "PROCMAP_QUERY"))) {
        errno = ENOTTY;
        return -1;
    }
    if (request != UFFDIO_API)
        return real(fd, request, argument);
    struct api *api = argument;
    if (api->features & hidden()) {
        memset(api, 0, sizeof *api);
        errno = EINVAL;
        return -1;
    }
    int status = real(fd, request, argument);
    api->features &= ~hidden();
    return status;
}

long syscall(long number, ...) {
    static long (*real)(long, ...);
    long given[6];
    va_list list;
    if (!real)
        real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    if (number == SYS_kcmp && masked("MASK_CALLS", "kcmp")) {
        errno = EPERM;
        return -1;
    }
    va_start(list, number);
    for (int i = 0; i < 6; i++)
        given[i] = va_arg(list, long);
    va_end(list);
    return real(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}

int uname(struct utsname *names) {
    static int (*real)(struct utsname *);
    const char *release = getenv("MASK_RELEASE");
    if (!real)
        real = (int (*)(struct utsname *))dlsym(RTLD_NEXT, "uname");
    int status = real(names);
    if (!status && release)
        strncpy(names->release, release, sizeof names->release - 1);
    return status;
}
