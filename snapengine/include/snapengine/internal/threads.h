/* Threads without a Python thread state, their scheduling, and their clock. */
#ifndef SNAPENGINE_THREADS_H
#define SNAPENGINE_THREADS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* pthread_create with signals blocked: a handler of the program that ran on this thread could access
 * protected memory. SIGSEGV and SIGBUS stay unblocked: the kernel kills a process that faults while the
 * signal is blocked, and snapengine.base.nofault handles them. */
static inline int snap_thread_start(pthread_t *thread, void *(*start)(void *), void *arg) {
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int err = pthread_create(thread, 0, start, arg);
    pthread_sigmask(SIG_SETMASK, &before, 0);
    return err;
}

static inline int snap_pin_to(int n) {
    cpu_set_t usable, one;
    if (sched_getaffinity(0, sizeof usable, &usable))
        return -1;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &usable) && n-- == 0) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            return sched_setaffinity(0, sizeof one, &one);
        }
    }
    return -1;
}

/* Move the calling thread to another CPU if it runs on `cpu` and may run elsewhere. Returns 1 if it moved;
 * `before` is then the argument of snap_restore_affinity(). */
static inline int snap_leave_cpu(int cpu, cpu_set_t *before) {
    cpu_set_t others;
    if (cpu < 0 || cpu >= CPU_SETSIZE || sched_getcpu() != cpu || sched_getaffinity(0, sizeof *before, before))
        return 0;
    others = *before;
    CPU_CLR(cpu, &others);
    return CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof others, &others) == 0;
}
static inline void snap_restore_affinity(const cpu_set_t *before) {
    sched_setaffinity(0, sizeof *before, before);
}

static inline unsigned long long snap_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static inline void snap_sleep_ns(unsigned long long ns) {
    struct timespec left = {(time_t)(ns / 1000000000ull), (long)(ns % 1000000000ull)};
    clock_nanosleep(CLOCK_MONOTONIC, 0, &left, 0);
}

/* Set the nice value of the calling thread (on Linux it belongs to the thread, not the process). A value
 * below 0 requires CAP_SYS_NICE; without it the call has no effect. */
static inline void snap_nice(int value) { setpriority(PRIO_PROCESS, 0, value); }

/* Set the nice value and the time slice of the calling thread (sched_setattr(2)). A thread that wakes up
 * with a shorter slice than the running thread preempts it; the nice values alone determine the CPU
 * shares. Before Linux 6.12 the slice has no effect. */
static inline void snap_nice_slice(int value, uint64_t slice_ns) {
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attr = {sizeof attr, SCHED_OTHER, 0, 0, 0, slice_ns, 0, 0};
    snap_nice(value);
    attr.nice = getpriority(PRIO_PROCESS, 0);
    syscall(SYS_sched_setattr, 0, &attr, 0);
}

static inline void snap_name_thread(const char *name) { prctl(PR_SET_NAME, name, 0, 0, 0); }

#endif
