/* ptrace(2) requests newer than the oldest supported headers, the structs that they use, the helper
 * process that runs its callers, and scheduling that keeps a stop short. */
#ifndef SNAPENGINE_PTRACE_H
#define SNAPENGINE_PTRACE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifndef PTRACE_GET_RSEQ_CONFIGURATION /* Linux 5.13 */
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
#endif
#ifndef PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG /* Linux 6.4 */
#define PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG 0x4210
#define PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG 0x4211
#endif
#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif
#ifndef SYS_epoll_pwait2 /* Linux 5.11 */
#define SYS_epoll_pwait2 441
#endif
#ifndef SYS_pidfd_getfd /* Linux 5.6 */
#define SYS_pidfd_getfd 438
#endif

/* struct ptrace_rseq_configuration of linux/ptrace.h, which cannot be included beside sys/ptrace.h. */
struct snap_rseq_config {
    uint64_t rseq_abi_pointer;
    uint32_t rseq_abi_size;
    uint32_t signature;
    uint32_t flags;
    uint32_t pad;
};
/* struct rseq_cs of linux/rseq.h, a critical section; its address is at byte 8 of struct rseq. */
struct snap_rseq_cs {
    uint32_t version;
    uint32_t flags;
    uint64_t start_ip;
    uint64_t post_commit_offset;
    uint64_t abort_ip;
};
#define SNAP_RSEQ_CS_OFFSET 8
/* struct ptrace_sud_config of linux/ptrace.h: Syscall User Dispatch (Wine). */
struct snap_sud_config {
    uint64_t mode;
    uint64_t selector;
    uint64_t offset;
    uint64_t len;
};

/* The system call, not glibc's ptrace(): PEEK requests store the word at `data`. Returns 0 or an errno. */
static inline int snap_ptrace(int request, pid_t tid, uintptr_t addr, void *data) {
    return syscall(SYS_ptrace, (long)request, (long)tid, addr, data) < 0 ? errno : 0;
}

/* Run fn(arg) in a helper process that shares our memory and descriptors, as posix_spawn does, and wait until
 * it exits. After a SIGKILL of the caller the helper keeps running, unless it calls snap_end_with_parent().
 *
 * A separate process keeps ptrace stops out of the program's waits. waitpid(2) without __WNOTHREAD returns
 * events of the tracees of all threads of a process: Popen.poll() or Popen.wait() of the program would report
 * a ptrace stop of its child as the child's exit. The stops of the helper's tracees are reported to the
 * helper alone.
 *
 * All signals are blocked while it runs, so that no signal handler runs in the helper on the caller's
 * data. The exit signal is 0: the program gets no SIGCHLD, and no wait(-1) of another thread reaps the
 * helper. Returns 0 or an errno. */
#define SNAP_HELPER_GUARD 4096
#define SNAP_HELPER_STACK (SNAP_HELPER_GUARD + 65536)
static inline int snap_run_in_helper(int (*fn)(void *), void *arg) {
    sigset_t all, before;
    char *stack =
        mmap(0, SNAP_HELPER_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED)
        return errno;
#ifdef __SANITIZE_ADDRESS__
    /* A helper that was killed has left the shadow of its frames poisoned, and this may be the same memory. */
    __asan_unpoison_memory_region(stack, SNAP_HELPER_STACK);
#endif
    mprotect(stack, SNAP_HELPER_GUARD, PROT_NONE);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int child = clone(fn, stack + SNAP_HELPER_STACK, CLONE_VM | CLONE_FILES | CLONE_VFORK, arg);
    int err = child < 0 ? errno : 0;
    if (child > 0)
        while (waitpid(child, 0, __WALL) < 0 && errno == EINTR)
            ;
    pthread_sigmask(SIG_SETMASK, &before, 0);
    munmap(stack, SNAP_HELPER_STACK);
    return err;
}

/* In a helper: request SIGKILL for when the thread that waits for it exits, which includes the exit and an
 * execve(2) of its process (prctl(2), PR_SET_PDEATHSIG). `parent` is the id of that process. Returns 0, or
 * ESRCH if it has exited already. */
static inline int snap_end_with_parent(pid_t parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    return getppid() == parent ? 0 : ESRCH;
}

/* Create a task that exits at once, and store its id: older tasks have lower ids, until ids wrap at pid_max.
 * For helpers, which have all signals blocked. Returns 0 or an errno. */
static inline int snap_do_nothing(void *arg) {
    (void)arg;
    return 0;
}
static inline int snap_newest_id(int *newest) {
    char stack[4096] __attribute__((aligned(16)));
    *newest = clone(snap_do_nothing, stack + sizeof stack, CLONE_VM | CLONE_FILES | CLONE_VFORK, 0);
    if (*newest < 0)
        return errno;
    while (waitpid(*newest, 0, __WALL) < 0 && errno == EINTR)
        ;
    return 0;
}

/* In a helper: leave the caller's process group and session, so that it gets no signals sent to those. Reset
 * the action of SIGCHLD to the default, so that sigtimedwait receives it. */
static inline void snap_leave_session(void) {
    struct sigaction plain;
    memset(&plain, 0, sizeof plain);
    plain.sa_handler = SIG_DFL;
    setsid();
    sigaction(SIGCHLD, &plain, 0);
}

/* Wait at most `ns` for a state change of a child or tracee of this process. SIGCHLD must be blocked. */
static inline void snap_await_child(uint64_t ns) {
    struct timespec left = {(time_t)(ns / 1000000000ull), (long)(ns % 1000000000ull)};
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigtimedwait(&child, 0, &left);
}

/* Raise the priority of the calling helper above other threads, since it keeps the target stopped: a
 * real-time policy if permitted (CAP_SYS_NICE or RLIMIT_RTPRIO), else a lower nice value if permitted.
 * Children inherit the policy: snap_newest_id() waits for its child during the stop. */
static inline void snap_boost_self(void) {
    struct sched_param first = {.sched_priority = 10};
    if (sched_setscheduler(0, SCHED_FIFO, &first))
        setpriority(PRIO_PROCESS, 0, -19);
}

/* Set the nice value of the runnable thread `tid` to -20, so that it gets a CPU soon: a thread can stop
 * only when it runs. A real-time policy is not used, since the thread would keep it if we were killed.
 * Returns the previous nice value, or SNAP_NICE_KEPT if it was not changed. */
#define SNAP_NICE_KEPT 100
static inline int snap_raise_nice(pid_t tid) {
    errno = 0;
    int before = getpriority(PRIO_PROCESS, tid);
    return (before == -1 && errno) || setpriority(PRIO_PROCESS, tid, -20) ? SNAP_NICE_KEPT : before;
}

/* Undo snap_raise_nice(), unless the nice value has been changed since. */
static inline void snap_restore_nice(pid_t tid, int before) {
    if (before != SNAP_NICE_KEPT && getpriority(PRIO_PROCESS, tid) == -20)
        setpriority(PRIO_PROCESS, tid, before);
}

/* Give the stopped thread `tid` a real-time policy, so that its remote calls run at once: on a loaded
 * machine it would wait milliseconds for a CPU for each call. Returns the previous policy, for
 * snap_unboost_thread(), or -1 if it was not changed. sched_setscheduler keeps the nice value and the time
 * slice; sched_setattr would not. */
static inline int snap_boost_thread(pid_t tid) {
    struct sched_param first = {.sched_priority = 10};
    int before = sched_getscheduler(tid), policy = before & ~SCHED_RESET_ON_FORK;
    if (before < 0 || (policy != SCHED_OTHER && policy != SCHED_BATCH && policy != SCHED_IDLE))
        return -1;
    return sched_setscheduler(tid, SCHED_FIFO | (before & SCHED_RESET_ON_FORK), &first) ? -1 : before;
}

static inline void snap_unboost_thread(pid_t tid, int before) {
    struct sched_param none = {.sched_priority = 0};
    if (before >= 0)
        sched_setscheduler(tid, before, &none);
}

/* Size of the largest NT_X86_XSTATE of this CPU (cpuid leaf 0xD, ecx: with all supported features). */
static inline size_t snap_xstate_bytes(void) {
    unsigned a, b, c = 0, d;
    return __get_cpuid_count(0xD, 0, &a, &b, &c, &d) && c > 576 ? c : 576;
}

#endif
