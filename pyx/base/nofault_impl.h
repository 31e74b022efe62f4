/* Loads and stores of memory that may be gone: a call that a fault ends instead of the program.
 *
 * snap_guarded_call() notes the stack pointer of its frame and calls a function. If that faults (SIGSEGV,
 * SIGBUS) at an address within the range which the caller names, the handler puts the thread back into that
 * frame, and the call returns -1. This is longjmp() by the kernel's own return from the
 * handler, without a signal mask to save: a guarded call costs 4 ns, one that faults 4 µs (AMD Zen 4). What the
 * function had written until then stays, what it held in registers is lost: it must neither allocate nor
 * take a lock.
 *
 * Any other fault goes to the handler that was there before, or ends the program as it would have. */
#ifndef SNAPENGINE_GUARD_IMPL_H
#define SNAPENGINE_GUARD_IMPL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

struct snap_guard {
    uintptr_t frame;  /* stack pointer of the guarded call; 0: there is none. First: the assembler knows it. */
    uintptr_t shadow; /* shadow stack pointer (CET), or 0 */
    uintptr_t low, high;
};

/* Only this thread and the handlers that run on it use it. Initial-exec: other models may allocate when a
 * thread touches it first, and a handler must not. */
static __thread struct snap_guard snap_guard __attribute__((tls_model("initial-exec")));
/* Which handler before ours runs on this thread now: its place in snap_chains, counted from 1;
 * 0: none. */
static __thread int snap_passing_on __attribute__((tls_model("initial-exec")));

__attribute__((visibility("hidden"))) int snap_guarded_enter(int (*fn)(void *), void *arg,
                                                             struct snap_guard *guard);
__attribute__((visibility("hidden"))) extern const char snap_guarded_fault[];

__asm__(".pushsection .text\n"
        ".local snap_guarded_enter\n"
        ".type snap_guarded_enter, @function\n"
        "snap_guarded_enter:\n"
        ".cfi_startproc\n"
        "endbr64\n"
        "push %rbp\n.cfi_adjust_cfa_offset 8\n.cfi_rel_offset rbp, 0\n"
        "push %rbx\n.cfi_adjust_cfa_offset 8\n.cfi_rel_offset rbx, 0\n"
        "push %r12\n.cfi_adjust_cfa_offset 8\n.cfi_rel_offset r12, 0\n"
        "push %r13\n.cfi_adjust_cfa_offset 8\n.cfi_rel_offset r13, 0\n"
        "push %r14\n.cfi_adjust_cfa_offset 8\n.cfi_rel_offset r14, 0\n"
        "push %r15\n.cfi_adjust_cfa_offset 8\n.cfi_rel_offset r15, 0\n"
        "push %rdx\n.cfi_adjust_cfa_offset 8\n"
        "xor %eax, %eax\n"
        "rdsspq %rax\n" /* a no-op without shadow stacks */
        "mov %rax, 8(%rdx)\n"
        "mov %rsp, (%rdx)\n"
        "mov %rdi, %rax\n"
        "mov %rsi, %rdi\n"
        "call *%rax\n"
        "1:\n"
        "pop %rdx\n.cfi_adjust_cfa_offset -8\n"
        "movq $0, (%rdx)\n"
        "pop %r15\n.cfi_adjust_cfa_offset -8\n"
        "pop %r14\n.cfi_adjust_cfa_offset -8\n"
        "pop %r13\n.cfi_adjust_cfa_offset -8\n"
        "pop %r12\n.cfi_adjust_cfa_offset -8\n"
        "pop %rbx\n.cfi_adjust_cfa_offset -8\n"
        "pop %rbp\n.cfi_adjust_cfa_offset -8\n"
        "ret\n"
        ".local snap_guarded_fault\n"
        "snap_guarded_fault:\n"
        ".cfi_adjust_cfa_offset 56\n"
        "mov (%rsp), %rdx\n"
        "xor %eax, %eax\n"
        "rdsspq %rax\n"
        "test %rax, %rax\n"
        "jz 2f\n"
        "mov 8(%rdx), %rcx\n" /* the calls that the fault has ended are on the shadow stack still */
        "sub %rax, %rcx\n"
        "shr $3, %rcx\n"
        "incsspq %rcx\n"
        "2:\n"
        "mov $-1, %eax\n"
        "jmp 1b\n"
        ".cfi_endproc\n"
        ".size snap_guarded_enter, . - snap_guarded_enter\n"
        ".popsection\n");

/* fn(arg), or -1 if it faulted in [low, high). Not nested. */
static inline int snap_guarded_call(int (*fn)(void *), void *arg, uintptr_t low, uintptr_t high) {
    snap_guard.low = low;
    snap_guard.high = high;
    return snap_guarded_enter(fn, arg, &snap_guard);
}

enum { SNAP_BEFORE_MAX = 8 };

/* Whose handlers were there, the oldest first. Usually one; but a host that sets its own while a capture runs,
 * and goes on by calling the handler that it found (ours), would go round for ever if ours knew only the host's.
 * Written under the lock, each before `n` and before ours is in force; read by handlers. */
struct snap_chain {
    struct sigaction before[SNAP_BEFORE_MAX];
    int n;
};

static const int snap_fault_signals[2] = {SIGSEGV, SIGBUS};
static struct snap_chain snap_chains[2];
static void (*snap_restorer)(void); /* what a handler that the kernel calls returns to; 0: not known yet */
static pthread_mutex_t snap_guard_lock = PTHREAD_MUTEX_INITIALIZER;
static int snap_guard_users;

static void snap_die_of(int number, const siginfo_t *info) {
    struct sigaction plain;
    memset(&plain, 0, sizeof plain);
    plain.sa_handler = SIG_DFL;
    sigaction(number, &plain, 0);
    if (info->si_code <= 0) /* sent: it does not come again by itself */
        syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), number);
}

static void snap_pass_on(int number, siginfo_t *info, void *context) {
    const struct snap_chain *chain = &snap_chains[number == SIGBUS];
    /* The handler before ours called ours: it means the one before it. */
    int place = snap_passing_on ? snap_passing_on - 1 : __atomic_load_n(&chain->n, __ATOMIC_ACQUIRE);
    const struct sigaction *before;
    int passing_on = snap_passing_on;
    if (place == 0) {
        snap_die_of(number, info);
        return;
    }
    before = &chain->before[place - 1];
    if (before->sa_flags & SA_SIGINFO) {
        snap_passing_on = place;
        before->sa_sigaction(number, info, context);
        snap_passing_on = passing_on;
    } else if (before->sa_handler == SIG_IGN && info->si_code <= 0) {
        return;
    } else if (before->sa_handler == SIG_DFL || before->sa_handler == SIG_IGN) {
        snap_die_of(number, info);
    } else {
        snap_passing_on = place;
        before->sa_handler(number);
        snap_passing_on = passing_on;
    }
}

static void snap_on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    uintptr_t at = (uintptr_t)info->si_addr;
    if (__builtin_return_address(0) == (void *)snap_restorer)
        snap_passing_on = 0; /* called by the kernel: the handler before ours has left its last fault by longjmp() */
    if (snap_guard.frame && info->si_code > 0 && at >= snap_guard.low && at < snap_guard.high) {
        registers[REG_RIP] = (greg_t)(uintptr_t)snap_guarded_fault;
        registers[REG_RSP] = (greg_t)snap_guard.frame;
        return;
    }
    snap_pass_on(number, info, context);
}

static int snap_is_ours(const struct sigaction *action) {
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == snap_on_fault;
}

static int snap_is_same(const struct sigaction *one, const struct sigaction *other) {
    return one->sa_handler == other->sa_handler && one->sa_flags == other->sa_flags;
}

/* `now` is what ours goes before. One that is known already has been put back by its owner: what came after it
 * is no longer called by anybody. A chain that is full keeps its oldest, which ends the others' calls. */
static void snap_put_behind(struct snap_chain *chain, const struct sigaction *now) {
    int place = 0;
    while (place < chain->n && !snap_is_same(&chain->before[place], now))
        place++;
    if (place == SNAP_BEFORE_MAX)
        place--;
    chain->before[place] = *now;
    __atomic_store_n(&chain->n, place + 1, __ATOMIC_RELEASE);
}

/* A child of fork() has the lock as it was: held, if another thread was between its two ends. */
static void snap_guard_before_fork(void) { pthread_mutex_lock(&snap_guard_lock); }

static void snap_guard_after_fork(void) { pthread_mutex_unlock(&snap_guard_lock); }

static void snap_guard_watch_forks(void) {
    pthread_atfork(snap_guard_before_fork, snap_guard_after_fork, snap_guard_after_fork);
}

/* Guarded calls are safe from here until snap_guard_end(). Somebody may have set a handler since the last
 * time: ours goes before it. SA_ONSTACK, and the mask and SA_NODEFER of the one before, which may count on it. */
static void snap_guard_begin(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct sigaction now, ours;
    pthread_once(&once, snap_guard_watch_forks);
    pthread_mutex_lock(&snap_guard_lock);
    snap_guard_users++;
    for (int i = 0; i < 2; i++) {
        sigaction(snap_fault_signals[i], 0, &now);
        if (snap_is_ours(&now))
            continue;
        snap_put_behind(&snap_chains[i], &now);
        ours = now;
        ours.sa_sigaction = snap_on_fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | (now.sa_flags & SA_NODEFER);
        sigaction(snap_fault_signals[i], &ours, 0);
        sigaction(snap_fault_signals[i], 0, &ours);
        snap_restorer = ours.sa_restorer;
    }
    pthread_mutex_unlock(&snap_guard_lock);
}

/* The last one puts back what was there, unless somebody has set another handler meanwhile (which may call ours
 * for ever: it stays able to pass on). */
static void snap_guard_end(void) {
    struct sigaction now;
    pthread_mutex_lock(&snap_guard_lock);
    if (--snap_guard_users == 0)
        for (int i = 0; i < 2; i++) {
            struct snap_chain *chain = &snap_chains[i];
            if (!sigaction(snap_fault_signals[i], 0, &now) && snap_is_ours(&now))
                sigaction(snap_fault_signals[i], &chain->before[chain->n - 1], 0);
        }
    pthread_mutex_unlock(&snap_guard_lock);
}

/* A fault whose signal is blocked ends the program without asking a handler. */
static inline void snap_guard_thread(void) {
    sigset_t faults;
    sigemptyset(&faults);
    sigaddset(&faults, SIGSEGV);
    sigaddset(&faults, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &faults, 0);
}

#endif
