/* Loads and stores of memory that may have been unmapped: a fault ends a guarded call, not the process.
 *
 * snap_guarded_call() saves the stack pointer of its frame and calls a function. If the function faults
 * (SIGSEGV, SIGBUS) at an address in the range given by the caller, the signal handler sets the registers of
 * the thread to return to that frame, and the call returns -1. The effect is that of longjmp(), performed by
 * the kernel's return from the handler, with no signal mask to save: a guarded call costs 4 ns, one that
 * faults 4 µs (AMD Zen 4). What the function wrote before the fault remains; its registers are lost. It must
 * therefore neither allocate memory nor take a lock.
 *
 * Any other fault is forwarded to the previous handler, or gets the default action. */
#ifndef SNAPENGINE_NOFAULT_IMPL_H
#define SNAPENGINE_NOFAULT_IMPL_H

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
    uintptr_t frame;  /* stack pointer of the guarded call; 0: none. The assembly depends on its offset. */
    uintptr_t shadow; /* shadow stack pointer (CET), or 0 */
    uintptr_t low, high;
};

/* Accessed only by its thread and by handlers that run on it. Initial-exec, because other TLS models may
 * allocate on the first access of a thread, which a signal handler must not do. */
static __thread struct snap_guard snap_guard __attribute__((tls_model("initial-exec")));
/* The previous handler that runs on this thread now: its position in snap_chains, counted from 1; 0: none. */
static __thread int snap_forwarding __attribute__((tls_model("initial-exec")));

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
        "mov 8(%rdx), %rcx\n" /* pop the frames of the abandoned calls from the shadow stack */
        "sub %rax, %rcx\n"
        "shr $3, %rcx\n"
        "incsspq %rcx\n"
        "2:\n"
        "mov $-1, %eax\n"
        "jmp 1b\n"
        ".cfi_endproc\n"
        ".size snap_guarded_enter, . - snap_guarded_enter\n"
        ".popsection\n");

/* Call fn(arg). Returns its result, or -1 if it faulted in [low, high). Must not be nested. */
static inline int snap_guarded_call(int (*fn)(void *), void *arg, uintptr_t low, uintptr_t high) {
    snap_guard.low = low;
    snap_guard.high = high;
    return snap_guarded_enter(fn, arg, &snap_guard);
}

enum { SNAP_PREVIOUS_MAX = 8 };

/* The previous handlers, oldest first; usually one. More than one is needed when the program installs its
 * own handler during a capture and that handler calls the one it replaced, which is ours: with a single
 * previous handler the two would call each other without end. Entries are written under the lock, before
 * `n` and before our handler is installed. Handlers read them. */
struct snap_chain {
    struct sigaction previous[SNAP_PREVIOUS_MAX];
    int n;
};

static const int snap_fault_signals[2] = {SIGSEGV, SIGBUS};
static struct snap_chain snap_chains[2];
static void (*snap_restorer)(void); /* return address of a handler called by the kernel; 0: not known yet */
static pthread_mutex_t snap_guard_lock = PTHREAD_MUTEX_INITIALIZER;
static int snap_guard_users;

static void snap_default_action(int number, const siginfo_t *info) {
    struct sigaction plain;
    memset(&plain, 0, sizeof plain);
    plain.sa_handler = SIG_DFL;
    sigaction(number, &plain, 0);
    if (info->si_code <= 0) /* sent by kill(2) or the like: it does not recur, so send it again */
        syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), number);
}

static void snap_forward(int number, siginfo_t *info, void *context) {
    const struct snap_chain *chain = &snap_chains[number == SIGBUS];
    /* A previous handler that calls ours is forwarded to its own predecessor. */
    int position = snap_forwarding ? snap_forwarding - 1 : __atomic_load_n(&chain->n, __ATOMIC_ACQUIRE);
    const struct sigaction *previous;
    int forwarding = snap_forwarding;
    if (position == 0) {
        snap_default_action(number, info);
        return;
    }
    previous = &chain->previous[position - 1];
    if (previous->sa_flags & SA_SIGINFO) {
        snap_forwarding = position;
        previous->sa_sigaction(number, info, context);
        snap_forwarding = forwarding;
    } else if (previous->sa_handler == SIG_IGN && info->si_code <= 0) {
        return;
    } else if (previous->sa_handler == SIG_DFL || previous->sa_handler == SIG_IGN) {
        snap_default_action(number, info);
    } else {
        snap_forwarding = position;
        previous->sa_handler(number);
        snap_forwarding = forwarding;
    }
}

static void snap_on_fault(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    uintptr_t at = (uintptr_t)info->si_addr;
    if (__builtin_return_address(0) == (void *)snap_restorer)
        snap_forwarding = 0; /* called by the kernel: a previous handler left an earlier fault by longjmp() */
    if (snap_guard.frame && info->si_code > 0 && at >= snap_guard.low && at < snap_guard.high) {
        registers[REG_RIP] = (greg_t)(uintptr_t)snap_guarded_fault;
        registers[REG_RSP] = (greg_t)snap_guard.frame;
        return;
    }
    snap_forward(number, info, context);
}

static int snap_is_own_handler(const struct sigaction *action) {
    return (action->sa_flags & SA_SIGINFO) && action->sa_sigaction == snap_on_fault;
}

static int snap_same_handler(const struct sigaction *one, const struct sigaction *other) {
    return one->sa_handler == other->sa_handler && one->sa_flags == other->sa_flags;
}

/* Append `now`, the handler that ours replaces. If the chain has it already, the program has reinstalled
 * it, and the handlers after it are no longer in use. A full chain keeps its oldest entries and replaces
 * the last. */
static void snap_push_previous(struct snap_chain *chain, const struct sigaction *now) {
    int position = 0;
    while (position < chain->n && !snap_same_handler(&chain->previous[position], now))
        position++;
    if (position == SNAP_PREVIOUS_MAX)
        position--;
    chain->previous[position] = *now;
    __atomic_store_n(&chain->n, position + 1, __ATOMIC_RELEASE);
}

/* Hold the lock across fork(): otherwise the child could inherit it locked by a thread that it does not
 * have. */
static void snap_guard_before_fork(void) { pthread_mutex_lock(&snap_guard_lock); }

static void snap_guard_after_fork(void) { pthread_mutex_unlock(&snap_guard_lock); }

static void snap_guard_register_atfork(void) {
    pthread_atfork(snap_guard_before_fork, snap_guard_after_fork, snap_guard_after_fork);
}

/* Allow guarded calls until snap_guard_end(). If the program has installed a handler since the last call,
 * ours replaces it and forwards to it. Ours uses SA_ONSTACK, and the mask and SA_NODEFER of the replaced
 * handler, which may depend on them. */
static void snap_guard_begin(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct sigaction now, ours;
    pthread_once(&once, snap_guard_register_atfork);
    pthread_mutex_lock(&snap_guard_lock);
    snap_guard_users++;
    for (int i = 0; i < 2; i++) {
        sigaction(snap_fault_signals[i], 0, &now);
        if (snap_is_own_handler(&now))
            continue;
        snap_push_previous(&snap_chains[i], &now);
        ours = now;
        ours.sa_sigaction = snap_on_fault;
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | (now.sa_flags & SA_NODEFER);
        sigaction(snap_fault_signals[i], &ours, 0);
        sigaction(snap_fault_signals[i], 0, &ours);
        snap_restorer = ours.sa_restorer;
    }
    pthread_mutex_unlock(&snap_guard_lock);
}

/* The last user restores the replaced handlers, unless the program has installed others since. Those may call
 * ours at any later time, so the chains stay valid. */
static void snap_guard_end(void) {
    struct sigaction now;
    pthread_mutex_lock(&snap_guard_lock);
    if (--snap_guard_users == 0)
        for (int i = 0; i < 2; i++) {
            struct snap_chain *chain = &snap_chains[i];
            if (!sigaction(snap_fault_signals[i], 0, &now) && snap_is_own_handler(&now))
                sigaction(snap_fault_signals[i], &chain->previous[chain->n - 1], 0);
        }
    pthread_mutex_unlock(&snap_guard_lock);
}

/* The kernel kills a process that faults while the signal is blocked; no handler runs. */
static inline void snap_guard_thread(void) {
    sigset_t faults;
    sigemptyset(&faults);
    sigaddset(&faults, SIGSEGV);
    sigaddset(&faults, SIGBUS);
    pthread_sigmask(SIG_UNBLOCK, &faults, 0);
}

#endif
