/* Threads that wait in system calls for ever, and count how these calls end.
 *
 * usage: blocking WORDS CALL...   (one CALL: in the only thread)
 * COUNTERS + i: EINTR seen by call i; COUNTERS + 64 + i: other returns. READY counts the calls. */
#include "target.h"
#include <errno.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>

enum { FOREVER_S = 600 };

struct waiter {
    const char *name;
    int index, fd, other;
    uint64_t context;
    void *buffer;
};

static int epoll_of_a_pipe(void) {
    struct epoll_event event = {.events = EPOLLIN};
    int ends[2], epoll = epoll_create1(0);
    if (pipe(ends) || epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &event))
        exit(3);
    return epoll;
}

static int timed_socket(void) {
    struct timeval timeout = {FOREVER_S, 0};
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends))
        exit(3);
    setsockopt(ends[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    return ends[0];
}

static int listening_socket(void) {
    struct timeval timeout = {FOREVER_S, 0};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    if (listen(fd, 1))
        exit(3);
    return fd;
}

static int is(struct waiter *w, const char *name) { return !strcmp(w->name, name); }

static void prepare(struct waiter *w) {
    int ends[2];
    w->buffer = calloc(1, 4096);
    if (!strncmp(w->name, "epoll", 5))
        w->fd = epoll_of_a_pipe();
    else if (is(w, "recv_timeout") || is(w, "read_socket_timeout"))
        w->fd = timed_socket();
    else if (is(w, "accept_timeout"))
        w->fd = listening_socket();
    else if (is(w, "semtimedop"))
        w->fd = semget(IPC_PRIVATE, 1, 0600 | IPC_CREAT);
    else if (is(w, "msgrcv"))
        w->fd = msgget(IPC_PRIVATE, 0600 | IPC_CREAT);
    else if (is(w, "read_eventfd"))
        w->fd = eventfd(0, 0);
    else if (is(w, "io_getevents"))
        w->fd = (int)syscall(SYS_io_setup, 4, &w->context);
    else if (is(w, "io_uring_enter")) {
        struct io_uring_params params = {0};
        w->fd = (int)syscall(SYS_io_uring_setup, 4, &params);
    } else {
        if (pipe(ends))
            exit(3);
        w->fd = ends[0];
    }
    if (w->fd < 0)
        exit(4);
}

static long wait_once(struct waiter *w) {
    struct timespec long_time = {FOREVER_S, 0};
    struct epoll_event event;
    struct pollfd polled = {w->fd, POLLIN, 0};
    struct sembuf take = {0, -1, 0};
    sigset_t none, usr2;
    int word = 0;
    fd_set readable;
    sigemptyset(&none);
    sigemptyset(&usr2);
    sigaddset(&usr2, SIGUSR2);
    FD_ZERO(&readable);
    FD_SET(w->fd, &readable);
    if (is(w, "epoll_wait"))
        return epoll_wait(w->fd, &event, 1, -1);
    if (is(w, "epoll_wait_timeout"))
        return epoll_wait(w->fd, &event, 1, FOREVER_S * 1000);
    if (is(w, "epoll_pwait"))
        return epoll_pwait(w->fd, &event, 1, -1, &usr2);
    if (is(w, "epoll_pwait2"))
        return syscall(441, w->fd, &event, 1, &long_time, 0, 8);
    if (is(w, "recv_timeout"))
        return recv(w->fd, w->buffer, 8, 0);
    if (is(w, "accept_timeout"))
        return accept(w->fd, 0, 0);
    if (is(w, "semtimedop"))
        return semtimedop(w->fd, &take, 1, &long_time);
    if (is(w, "msgrcv"))
        return msgrcv(w->fd, w->buffer, 8, 0, 0);
    if (is(w, "sigtimedwait"))
        return sigtimedwait(&usr2, 0, &long_time);
    if (is(w, "io_getevents"))
        return syscall(SYS_io_getevents, w->context, 1, 1, w->buffer, &long_time);
    if (is(w, "io_uring_enter"))
        return syscall(SYS_io_uring_enter, w->fd, 0, 1, IORING_ENTER_GETEVENTS, 0, 0);
    if (is(w, "nanosleep"))
        return nanosleep(&long_time, 0);
    if (is(w, "futex"))
        return syscall(SYS_futex, &word, FUTEX_WAIT, 0, &long_time, 0, 0);
    if (is(w, "poll"))
        return poll(&polled, 1, FOREVER_S * 1000);
    if (is(w, "pselect"))
        return pselect(w->fd + 1, &readable, 0, 0, &long_time, &usr2);
    if (is(w, "pause"))
        return pause();
    if (is(w, "sigsuspend"))
        return sigsuspend(&none);
    return read(w->fd, w->buffer, 8); /* read_pipe, read_eventfd, read_socket_timeout */
}

static void *wait_for_ever(void *arg) {
    struct waiter *w = arg;
    prepare(w);
    words[READY]++;
    for (;;) {
        long result = wait_once(w);
        words[COUNTERS + (result < 0 && errno == EINTR ? 0 : 64) + w->index]++;
        if (result >= 0 || errno != EINTR)
            usleep(1000);
    }
    return 0;
}

int main(int argc, char **argv) {
    struct waiter *waiters = calloc(argc, sizeof *waiters);
    pthread_t thread;
    open_words(argv[1]);
    for (int i = 2; i < argc; i++) {
        waiters[i].name = argv[i];
        waiters[i].index = i - 2;
        if (argc > 3)
            pthread_create(&thread, 0, wait_for_ever, &waiters[i]);
    }
    if (argc == 3)
        wait_for_ever(&waiters[2]);
    for (;;)
        pause();
}
