from snapengine.kernel.ptrace cimport user_regs_struct

# One thread of another process under ptrace(2). All calls for a thread must come from the OS thread that
# seized it. Functions return 0 or an errno value unless they say otherwise.

cdef enum stand_t:
    RUNNING                         # no stop yet
    STANDING                        # PTRACE_EVENT_STOP: about to return to user mode, or group-stopped
    IN_SYSCALL                      # a stop of PTRACE_SYSCALL
    CLONED                          # made a thread, which is traced from its birth; goes on running
    ENDED


cdef int tracee_seize(int tid, int options) noexcept nogil
cdef int tracee_interrupt(int tid) noexcept nogil
# What the thread does now; never blocks. `request` says what is waited for: PTRACE_CONT STANDING, or
# PTRACE_SYSCALL IN_SYSCALL. Stops on the way there are passed, and their signals delivered. `born` gets the
# tid of a new thread.
cdef stand_t tracee_poll(int tid, int request, int *born) noexcept nogil
# Make a standing thread go on where it would have, had nobody stopped it. `remasked`: its signal mask was
# set by PTRACE_SETSIGMASK. Changes `regs` only; 1 if it did.
cdef bint tracee_settle(int pid, int tid, user_regs_struct *regs, bint remasked) noexcept nogil
cdef int tracee_detach(int tid) noexcept nogil
# The same without waitpid: for a stop whose report another thread's wait(-1) has taken.
cdef stand_t tracee_look(int tid, int request, int *born) noexcept nogil
# Why PTRACE_SEIZE was refused with EPERM, or a thread does not stop: 0 it has ended or is a worker of the
# kernel; EAGAIN it is ending, and may yet write its clear_child_tid; EBUSY `tracer` (a thread) traces it;
# else EPERM.
cdef int tracee_refusal(int pid, int tid, int *tracer) noexcept nogil
# Whether a thread sleeps in the kernel until the child of its vfork has executed or ended.
cdef bint tracee_in_vfork(int pid, int tid) noexcept nogil
# The name of a thread, at most 15 bytes; empty if it is gone.
cdef void tracee_comm(int pid, int tid, char comm[16]) noexcept nogil
