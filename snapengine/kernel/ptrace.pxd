# extern-only: no matching .pyx. ptrace(2) under its kernel names.
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t, uintptr_t

cdef extern from "snapengine/internal/ptrace.h" nogil:
    int PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_CONT, PTRACE_SYSCALL, PTRACE_DETACH
    int PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_GETREGSET, PTRACE_GETSIGMASK, PTRACE_SETSIGMASK
    int PTRACE_GETEVENTMSG, PTRACE_GET_RSEQ_CONFIGURATION, PTRACE_PEEKDATA, PTRACE_POKEDATA
    int PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG
    int PTRACE_O_TRACECLONE, PTRACE_O_TRACESYSGOOD, PTRACE_O_SUSPEND_SECCOMP
    int PTRACE_EVENT_STOP, PTRACE_EVENT_CLONE
    int NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE
    int SNAP_RSEQ_CS_OFFSET

    struct user_regs_struct:
        unsigned long long rsp, rip, rax, orig_rax, cs
        unsigned long long rdi, rsi, rdx, r10, r8, r9
    struct snap_rseq_config:
        uint64_t rseq_abi_pointer
        uint32_t rseq_abi_size
    struct snap_rseq_cs:
        uint64_t start_ip
        uint64_t post_commit_offset
        uint64_t abort_ip
    struct snap_sud_config:
        uint64_t mode
        uint64_t selector
        uint64_t offset
        uint64_t len

    int snap_ptrace(int request, int tid, uintptr_t addr, void *data)    # 0 or errno
    # Runs fn(arg) in a helper process that shares our memory and survives us; waits for its end. 0 or errno.
    int snap_run_in_helper(int (*fn)(void *) noexcept nogil, void *arg)
    # For helpers:
    int snap_end_with_parent(int parent)        # do not survive it. 0 or errno
    int snap_newest_id(int *newest)             # the id of a task made now. 0 or errno
    void snap_leave_session()
    void snap_await_child(uint64_t ns)
    void snap_boost_self()
    # Real-time scheduling for a stopped thread; returns its former policy for snap_unboost_thread, or -1.
    int snap_boost_thread(int tid)
    void snap_unboost_thread(int tid, int before)
    size_t snap_xstate_bytes()
    # The best nice value for a running thread; returns its former one for snap_restore_nice.
    int snap_raise_nice(int tid)
    void snap_restore_nice(int tid, int before)
