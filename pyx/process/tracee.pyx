"""One thread of another process under ptrace(2): seize, interrupt, wait for its stop, repair side effects,
detach.

Runs in the thread or helper process that traces: ptrace(2) binds a tracee to the OS thread that seized it.
Nothing here allocates, takes the GIL or blocks.

A thread stops for PTRACE_INTERRUPT on its way back to user mode. If it was in a system call, rax has the
result and orig_rax the number of the call; otherwise orig_rax is -1. The kernel itself restarts calls that
ended with ERESTARTSYS and the like, as long as both registers are unchanged. A ptrace stop has two more side
effects, which the kernel does not undo; `tracee_settle` does, and its helpers say how.
"""

from libc.errno cimport EAGAIN, EBUSY, ECHILD, EINTR, EPERM, errno
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.stdio cimport snprintf, sscanf
from libc.stdlib cimport strtol, strtoull
from libc.string cimport memcpy, strlen, strrchr, strstr
from posix.fcntl cimport O_CLOEXEC, O_RDONLY, open as c_open
from posix.types cimport pid_t
from posix.unistd cimport close, read

from snapengine.kernel.processvm cimport iovec, process_vm_readv
from snapengine.kernel.ptrace cimport (
    PTRACE_CONT, PTRACE_DETACH, PTRACE_EVENT_CLONE, PTRACE_EVENT_STOP, PTRACE_GETEVENTMSG,
    PTRACE_GET_RSEQ_CONFIGURATION, PTRACE_GETSIGMASK, PTRACE_INTERRUPT, PTRACE_SEIZE,
    SNAP_RSEQ_CS_OFFSET, snap_ptrace, snap_rseq_config, snap_rseq_cs, user_regs_struct,
)

cdef extern from "<sys/wait.h>" nogil:
    int __WALL, WNOHANG
    bint WIFSTOPPED(int status)
    int WSTOPSIG(int status)
    pid_t waitpid(pid_t pid, int *status, int options)

cdef extern from "<signal.h>" nogil:
    int SIGTRAP

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_read, SYS_write, SYS_readv, SYS_writev, SYS_accept, SYS_accept4, SYS_connect
    long SYS_sendto, SYS_recvfrom, SYS_sendmsg, SYS_recvmsg, SYS_sendmmsg, SYS_recvmmsg
    long SYS_semop, SYS_semtimedop, SYS_rt_sigtimedwait, SYS_io_getevents, SYS_io_pgetevents
    long SYS_epoll_wait, SYS_epoll_pwait, SYS_io_uring_enter
    long SYS_vfork, SYS_clone, SYS_clone3

cdef extern from "<sched.h>" nogil:
    unsigned long CLONE_VFORK

cdef extern from "snapengine/internal/ptrace.h" nogil:
    long SYS_epoll_pwait2

cdef enum:
    STATUS_BYTES = 4096             # /proc/PID/status is about 1500 bytes long
    PF_EXITING = 0x4                # include/linux/sched.h
    WORKER = 0x10 | 0x4000 | 0x200000           # PF_IO_WORKER, PF_USER_WORKER, PF_KTHREAD


cdef int tracee_seize(int tid, int options) noexcept nogil:
    return snap_ptrace(PTRACE_SEIZE, tid, 0, <void *><uintptr_t>options)


cdef int tracee_interrupt(int tid) noexcept nogil:
    return snap_ptrace(PTRACE_INTERRUPT, tid, 0, NULL)


cdef int tracee_detach(int tid) noexcept nogil:
    return snap_ptrace(PTRACE_DETACH, tid, 0, NULL)


cdef tracee_state_t tracee_poll(int tid, int request, int *born) noexcept nogil:
    cdef int status = 0
    cdef pid_t seen = waitpid(tid, &status, __WALL | WNOHANG)
    if seen < 0:
        return TRACEE_ENDED if errno == ECHILD else TRACEE_RUNNING
    if seen == 0:
        return TRACEE_RUNNING
    if not WIFSTOPPED(status):
        return TRACEE_ENDED
    return _classify(tid, request, status >> 16, WSTOPSIG(status), born)


cdef void tracee_reap_ended() noexcept nogil:
    cdef int status
    while waitpid(-1, &status, __WALL | WNOHANG) > 0:
        pass


cdef tracee_state_t _classify(int tid, int request, int event, int signal, int *born) noexcept nogil:
    cdef unsigned long message = 0
    if event == PTRACE_EVENT_STOP:
        return TRACEE_STOPPED
    if event == 0 and signal == (SIGTRAP | 0x80):         # PTRACE_O_TRACESYSGOOD
        return TRACEE_IN_SYSCALL
    if request == PTRACE_CONT:
        # Any stop consumes the pending interrupt (kernel/signal.c, ptrace_stop), so ask again.
        tracee_interrupt(tid)
    if event == PTRACE_EVENT_CLONE:
        snap_ptrace(PTRACE_GETEVENTMSG, tid, 0, &message)
        born[0] = <int>message
        snap_ptrace(request, tid, 0, NULL)
        return TRACEE_CLONED
    # A signal arrived before the stop. It is delivered now, with its siginfo, so no signal is lost or
    # reordered. The stop follows once the frame of the handler is set up.
    snap_ptrace(request, tid, 0, <void *><uintptr_t>(signal if event == 0 else 0))
    return TRACEE_RUNNING


cdef ssize_t _read_file(int pid, int tid, const char *name, char *text, size_t room) noexcept nogil:
    """/proc/PID/task/TID/NAME, NUL-terminated; its length, or -1."""
    cdef char path[64]
    cdef ssize_t count
    snprintf(path, sizeof(path), b"/proc/%d/task/%d/%s", pid, tid, name)
    cdef int fd = c_open(path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return -1
    count = read(fd, text, room - 1)
    close(fd)
    text[max(count, 0)] = 0
    return count


cdef uint64_t _number_after(const char *status, const char *name, int base) noexcept nogil:
    cdef const char *found = strstr(status, name)
    return strtoull(found + strlen(name), NULL, base) if found != NULL else 0


cdef bint _stat(int pid, int tid, char *state, unsigned *flags) noexcept nogil:
    """State and flags from /proc/PID/task/TID/stat; the state is 0 if they cannot be parsed. False: the
    thread has ended."""
    cdef char text[STATUS_BYTES]
    cdef const char *after_name
    state[0] = 0
    if _read_file(pid, tid, b"stat", text, sizeof(text)) <= 0:
        return False
    after_name = strrchr(text, c")")
    if after_name == NULL or sscanf(after_name + 1, b" %c %*d %*d %*d %*d %*d %u", state, flags) != 2:
        state[0] = 0
    return True


cdef int tracee_refusal(int pid, int tid, int *tracer) noexcept nogil:
    cdef char text[STATUS_BYTES]
    cdef char state = 0
    cdef unsigned flags = 0
    if not _stat(pid, tid, &state, &flags):
        return 0
    if state == 0:
        return EPERM
    if state in (c"Z", c"X", c"x") or flags & WORKER:
        return 0
    if flags & PF_EXITING:
        return EAGAIN
    if _read_file(pid, tid, b"status", text, sizeof(text)) <= 0:
        return 0
    tracer[0] = <int>_number_after(text, b"\nTracerPid:", 10)
    return EBUSY if tracer[0] else EPERM


cdef void tracee_comm(int pid, int tid, char comm[16]) noexcept nogil:
    cdef char text[32]                  # a name may contain line feeds; only the last one is not part of it
    cdef ssize_t length = _read_file(pid, tid, b"comm", text, sizeof(text))
    if length > 0 and text[length - 1] == c"\n":
        length -= 1
    length = max(0, min(length, 15))
    memcpy(comm, text, <size_t>length)
    comm[length] = 0


cdef bint _signal_masks(int pid, int tid, uint64_t *pending, uint64_t *blocked) noexcept nogil:
    """From /proc: PTRACE_GETSIGMASK returns the mask from before sigsuspend or epoll_pwait changed it, but
    the current mask decides which signals are delivered."""
    cdef char status[STATUS_BYTES]
    if _read_file(pid, tid, b"status", status, sizeof(status)) <= 0:
        return False
    pending[0] = _number_after(status, b"\nSigPnd:", 16) | _number_after(status, b"\nShdPnd:", 16)
    blocked[0] = _number_after(status, b"\nSigBlk:", 16)
    return True


cdef bint _repeatable(long call) noexcept nogil:
    """Calls that a stop ends with EINTR (signal(7), "Interruption of system calls ... by stop signals")
    before they have done anything, so that repeating them has the effect of continuing them. Calls on
    sockets end like this only with SO_RCVTIMEO or SO_SNDTIMEO. A relative timeout is started again."""
    return call in (
        SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_rt_sigtimedwait, SYS_semop, SYS_semtimedop,
        SYS_io_getevents, SYS_io_pgetevents, SYS_io_uring_enter, SYS_accept, SYS_accept4, SYS_connect,
        SYS_sendto, SYS_recvfrom, SYS_sendmsg, SYS_recvmsg, SYS_sendmmsg, SYS_recvmmsg,
        SYS_read, SYS_readv, SYS_write, SYS_writev,
    )


cdef bint _repeat_call(int pid, int tid, user_regs_struct *regs, bint remasked) noexcept nogil:
    """Repeat a call that our stop ended with EINTR: a program may take EINTR as the sign of a signal.

    If a signal is pending and not blocked, it may have ended the call, and EINTR stays. The exception is a
    signal that is blocked by the outer mask, which is in force from now on (`remasked`): it is delivered only
    inside the repeated call.
    """
    cdef uint64_t pending = 0, blocked = 0, outer = 0
    if <int64_t>regs.rax != -EINTR or not _repeatable(<long>regs.orig_rax):
        return False
    if not _signal_masks(pid, tid, &pending, &blocked):
        return False
    if pending & ~blocked:
        if not remasked or snap_ptrace(PTRACE_GETSIGMASK, tid, sizeof(outer), &outer) or outer == blocked:
            return False
    regs.rax = regs.orig_rax
    regs.rip -= 2                                   # the length of the syscall instruction
    regs.orig_rax = <unsigned long long>-1          # not in a call, so the kernel restarts nothing
    return True


cdef bint _peek(int pid, uint64_t addr, void *data, size_t length) noexcept nogil:
    cdef iovec local, remote
    local.iov_base = data
    remote.iov_base = <void *>addr
    local.iov_len = remote.iov_len = length
    return process_vm_readv(pid, &local, 1, &remote, 1, 0) == <ssize_t>length


cdef bint tracee_in_vfork(int pid, int tid) noexcept nogil:
    """Decided by its system call (proc_pid_syscall(5)), which the kernel shows only for a sleeping thread.
    The flags of clone3(2) are in memory."""
    cdef char text[256]
    cdef uint64_t flags = 0
    cdef unsigned task_flags = 0
    cdef char state = 0
    cdef long call
    cdef char *rest
    if not _stat(pid, tid, &state, &task_flags) or state != c"D":
        return False
    if _read_file(pid, tid, b"syscall", text, sizeof(text)) <= 0:
        return False
    call = strtol(text, &rest, 10)
    if rest == text:
        return False                                    # "running"
    if call == SYS_vfork:
        return True
    if call == SYS_clone:
        return strtoull(rest, NULL, 16) & CLONE_VFORK
    if call != SYS_clone3 or not _peek(tid, strtoull(rest, NULL, 16), &flags, sizeof(flags)):
        return False
    return flags & CLONE_VFORK


cdef bint _abort_rseq(int tid, user_regs_struct *regs) noexcept nogil:
    """rseq(2): a thread that was preempted inside a critical section continues at the abort address. The
    kernel checks the rip at the return to user mode. While we have set another rip, it would assume that the
    section was left; the restored rip would then finish it, possibly on another CPU."""
    cdef snap_rseq_config config
    cdef snap_rseq_cs section
    cdef uint64_t section_addr = 0
    # The call returns the number of bytes: only the content shows an error.
    config.rseq_abi_pointer = 0
    snap_ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, sizeof(config), &config)
    if config.rseq_abi_pointer == 0:
        return False
    if not _peek(tid, config.rseq_abi_pointer + SNAP_RSEQ_CS_OFFSET, &section_addr, sizeof(section_addr)):
        return False
    if section_addr == 0 or not _peek(tid, section_addr, &section, sizeof(section)):
        return False
    if regs.rip - section.start_ip >= section.post_commit_offset:
        return False
    regs.rip = section.abort_ip
    return True


cdef bint tracee_settle(int pid, int tid, user_regs_struct *regs, bint remasked) noexcept nogil:
    if <int64_t>regs.orig_rax < 0:
        return _abort_rseq(tid, regs)
    return _repeat_call(pid, tid, regs, remasked)
