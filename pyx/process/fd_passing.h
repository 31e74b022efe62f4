/* Pass a descriptor to another process over one of its own sockets: the layout of the page that the calls in
 * that process use, and the sending side. The page is mapped for this purpose and unmapped afterwards, so that no
 * byte of the process's own memory changes. */
#ifndef SNAPENGINE_PASSING_H
#define SNAPENGINE_PASSING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

union snap_control {
    struct cmsghdr header;
    char bytes[CMSG_SPACE(sizeof(int))];
};

/* The content of the page. Its addresses are those of the other process. */
struct snap_passing {
    int pair[2]; /* socketpair(2) writes it */
    struct msghdr message;
    struct iovec part;
    union snap_control control;
    char byte;
};

_Static_assert(offsetof(struct snap_passing, message) == 8, "PASSING_MESSAGE of inject.pyx");
_Static_assert(sizeof(struct snap_passing) % 8 == 0, "it is read and written in words");

/* A message with room for one descriptor; `at` is the address of `passing` in the process that uses it. */
static inline void snap_passing_init(struct snap_passing *passing, uint64_t at) {
    memset(passing, 0, sizeof *passing);
    passing->part.iov_base = (void *)(at + offsetof(struct snap_passing, byte));
    passing->part.iov_len = 1;
    passing->message.msg_iov = (struct iovec *)(at + offsetof(struct snap_passing, part));
    passing->message.msg_iovlen = 1;
    passing->message.msg_control = (void *)(at + offsetof(struct snap_passing, control));
    passing->message.msg_controllen = sizeof passing->control;
}

/* Send `fd` over `socket`: 0 or an errno value. */
static inline int snap_passing_send(int socket, int fd) {
    struct snap_passing passing;
    snap_passing_init(&passing, (uint64_t)(uintptr_t)&passing);
    passing.control.header.cmsg_len = CMSG_LEN(sizeof fd);
    passing.control.header.cmsg_level = SOL_SOCKET;
    passing.control.header.cmsg_type = SCM_RIGHTS;
    memcpy(CMSG_DATA(&passing.control.header), &fd, sizeof fd);
    return sendmsg(socket, &passing.message, MSG_DONTWAIT | MSG_NOSIGNAL) == 1 ? 0 : errno;
}

/* The descriptor that recvmsg(2) has put into the page; -1: the descriptor table was full, or a security
 * module refused it. */
static inline int snap_passing_received(const struct snap_passing *passing) {
    int fd = -1;
    if (passing->message.msg_controllen >= CMSG_LEN(sizeof fd) &&
        passing->control.header.cmsg_level == SOL_SOCKET && passing->control.header.cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(&passing->control.header), sizeof fd);
    return fd;
}

#endif
