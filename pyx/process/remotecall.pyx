"""System calls made by a stopped thread of another process, without side effects on its program.

Runs in the helper process of an injection; allocates nothing. The calls use PTRACE_SYSCALL, not single
steps: a step ends in SIGTRAP, and where the program ignores or blocks SIGTRAP, the kernel resets its handler
(kernel/signal.c, force_sig_info_to_task).

Meanwhile all signals but SIGKILL and SIGSTOP are blocked in the thread. They stay pending, or go to other
threads, and are delivered after PTRACE_DETACH. Nothing is dequeued, so none is lost. The detach sets
TIF_SIGPENDING, which also makes the kernel restart the call that the stop had interrupted.
"""

from libc.errno cimport EOPNOTSUPP, ESRCH, ETIMEDOUT
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from snapengine.kernel.ptrace cimport (
    PTRACE_CONT, PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, PTRACE_GETREGS, PTRACE_GETSIGMASK,
    PTRACE_PEEKDATA, PTRACE_POKEDATA, PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, PTRACE_SETREGS,
    PTRACE_SETSIGMASK, PTRACE_SYSCALL,
    snap_await_child, snap_boost_thread, snap_ptrace, snap_raise_nice, snap_restore_nice, snap_sud_config,
    snap_unboost_thread, user_regs_struct,
)
from snapengine.base.pthreads cimport snap_now_ns
from snapengine.process.tracee cimport (
    TRACEE_ENDED, TRACEE_IN_SYSCALL, TRACEE_STOPPED, tracee_detach, tracee_interrupt, tracee_poll,
    tracee_seize, tracee_settle, tracee_state_t,
)

cdef extern from "<unistd.h>" nogil:
    long c_syscall "syscall"(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_tgkill, SYS_pidfd_send_signal

cdef enum:
    USER_CS_64 = 0x33               # arch/x86/include/asm/segment.h: __USER_CS

cdef uint64_t POLL_NS = 10000000
cdef uint64_t FOREVER = <uint64_t>-1


cdef tracee_state_t _await(int tid, int request, uint64_t until) noexcept nogil:
    """The next stop of the thread, or TRACEE_RUNNING at the deadline."""
    cdef tracee_state_t state
    cdef uint64_t now
    cdef int born
    while True:
        state = tracee_poll(tid, request, &born)
        if state in (TRACEE_STOPPED, TRACEE_IN_SYSCALL, TRACEE_ENDED):
            return state
        now = snap_now_ns()
        if now >= until:
            return state
        snap_await_child(min(until - now, POLL_NS))


cdef bint _is_the_target(remote_t *remote, int pidfd) noexcept nogil:
    """Whether the stopped thread belongs to the process of `pidfd`, not to a later one with the same pid.
    Both are alive now, and a tracee cannot disappear unnoticed."""
    if c_syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0) != 0:
        return False
    return c_syscall(SYS_tgkill, remote.pid, remote.tid, 0) == 0


cdef void _disable_dispatch(remote_t *remote) noexcept nogil:
    """Syscall User Dispatch would answer our call with SIGSYS. Kernels without it leave `mode` at 0."""
    cdef snap_sud_config off
    memset(&remote.dispatch, 0, sizeof(remote.dispatch))
    snap_ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, remote.tid, sizeof(off), &remote.dispatch)
    if remote.dispatch.mode:
        memset(&off, 0, sizeof(off))
        snap_ptrace(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, remote.tid, sizeof(off), &off)


cdef int _stop(remote_t *remote, uint64_t limit_ns) noexcept nogil:
    cdef tracee_state_t state
    cdef int err, nice
    remote.stopped_ns = snap_now_ns()
    err = tracee_interrupt(remote.tid)
    if err:
        return err
    nice = snap_raise_nice(remote.tid)
    state = _await(remote.tid, PTRACE_CONT, remote.stopped_ns + limit_ns)
    snap_restore_nice(remote.tid, nice)
    if state == TRACEE_STOPPED:
        return 0
    return ESRCH if state == TRACEE_ENDED else ETIMEDOUT


cdef int _take_over(remote_t *remote, int pidfd, bint repair, step_t *step) noexcept nogil:
    cdef uint64_t everything = <uint64_t>-1
    cdef int err = snap_ptrace(PTRACE_GETREGS, remote.tid, 0, &remote.saved)
    if err:
        return err
    if not _is_the_target(remote, pidfd):
        return ESRCH
    if remote.saved.cs != USER_CS_64:
        step[0] = STEP_COMPAT
        return EOPNOTSUPP
    if repair:
        tracee_settle(remote.pid, remote.tid, &remote.saved, True)
    err = snap_ptrace(PTRACE_GETSIGMASK, remote.tid, sizeof(remote.mask), &remote.mask)
    if err == 0:
        err = snap_ptrace(PTRACE_SETSIGMASK, remote.tid, sizeof(everything), &everything)
    if err == 0:
        remote.scheduling = snap_boost_thread(remote.tid)
        _disable_dispatch(remote)
    return err


cdef int remote_stop(remote_t *remote, int pidfd, int options, uint64_t limit_ns, bint repair,
                     step_t *step) noexcept nogil:
    step[0] = STEP_SEIZE
    cdef int err = tracee_seize(remote.tid, options)
    if err:
        return err
    step[0] = STEP_STOP
    err = _stop(remote, limit_ns)
    if err:
        return err
    err = _take_over(remote, pidfd, repair, step)
    if err:
        tracee_detach(remote.tid)
    return err


cdef int _run_to_syscall_stop(int tid, uint64_t limit_ns) noexcept nogil:
    cdef uint64_t until = snap_now_ns() + limit_ns if limit_ns else FOREVER
    cdef bint given_up = False
    cdef tracee_state_t state
    cdef int err = snap_ptrace(PTRACE_SYSCALL, tid, 0, NULL)
    while err == 0:
        state = _await(tid, PTRACE_SYSCALL, until)
        if state == TRACEE_IN_SYSCALL:
            return 0
        if state == TRACEE_ENDED:
            return ESRCH
        if state == TRACEE_STOPPED:
            if given_up:
                return ETIMEDOUT
            err = snap_ptrace(PTRACE_SYSCALL, tid, 0, NULL)     # a group stop on the way
        elif not given_up:
            # The cgroup v2 freezer keeps it from running, but it still stops for an interrupt.
            given_up = True
            err = tracee_interrupt(tid)
            until = FOREVER
    return err


cdef int remote_call(remote_t *remote, long call, const uint64_t *args, uint64_t limit_ns,
                     int64_t *result) noexcept nogil:
    cdef user_regs_struct regs = remote.saved
    regs.rip = remote.insn
    regs.rax = <unsigned long long>call
    regs.orig_rax = <unsigned long long>-1      # else the kernel would restart a call at our rip
    regs.rdi = args[0]
    regs.rsi = args[1]
    regs.rdx = args[2]
    regs.r10 = args[3]
    regs.r8 = args[4]
    regs.r9 = args[5]
    cdef int err = snap_ptrace(PTRACE_SETREGS, remote.tid, 0, &regs)
    if err == 0:
        err = _run_to_syscall_stop(remote.tid, limit_ns)            # entry
    if err == 0:
        err = _run_to_syscall_stop(remote.tid, 0)                   # exit
    if err == 0:
        err = snap_ptrace(PTRACE_GETREGS, remote.tid, 0, &regs)
    if err == 0:
        result[0] = <int64_t>regs.rax
    return err


cdef int remote_get(remote_t *remote, uint64_t addr, uint64_t *words, size_t n) noexcept nogil:
    cdef size_t i
    cdef int err
    for i in range(n):
        err = snap_ptrace(PTRACE_PEEKDATA, remote.tid, addr + i * sizeof(uint64_t), &words[i])
        if err:
            return err
    return 0


cdef int remote_put(remote_t *remote, uint64_t addr, const uint64_t *words, size_t n) noexcept nogil:
    cdef size_t i
    cdef int err
    for i in range(n):
        err = snap_ptrace(PTRACE_POKEDATA, remote.tid, addr + i * sizeof(uint64_t), <void *><size_t>words[i])
        if err:
            return err
    return 0


cdef int remote_release(remote_t *remote) noexcept nogil:
    if remote.dispatch.mode:
        snap_ptrace(PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG, remote.tid, sizeof(remote.dispatch),
                    &remote.dispatch)
    cdef int err = snap_ptrace(PTRACE_SETREGS, remote.tid, 0, &remote.saved)
    if err == 0:
        err = snap_ptrace(PTRACE_SETSIGMASK, remote.tid, sizeof(remote.mask), &remote.mask)
    snap_unboost_thread(remote.tid, remote.scheduling)
    tracee_detach(remote.tid)
    return err
