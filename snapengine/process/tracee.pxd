from snapengine.kernel.ptrace cimport user_regs_struct

# One thread of another process under ptrace(2). All calls for a thread must come from the OS thread that
# seized it. Functions return 0 or an errno value unless they say otherwise.

cdef enum tracee_state_t:
    TRACEE_RUNNING                         # no stop yet
    TRACEE_STOPPED                        # PTRACE_EVENT_STOP: about to return to user mode, or group-stopped
    TRACEE_IN_SYSCALL                      # a stop of PTRACE_SYSCALL
    TRACEE_CLONED                          # created a thread, which is traced from its start; keeps running
    TRACEE_ENDED


cdef int tracee_seize(int tid, int options) noexcept nogil
cdef int tracee_interrupt(int tid) noexcept nogil
# The current state of the thread; never blocks. `request` selects the expected stop: PTRACE_CONT waits for
# TRACEE_STOPPED, PTRACE_SYSCALL for TRACEE_IN_SYSCALL. After any other stop the thread is continued, and the
# signal of that stop is delivered. `born` gets the tid of a new thread.
cdef tracee_state_t tracee_poll(int tid, int request, int *born) noexcept nogil
# Reap what has ended, in a process whose tracees are all stopped. Until a tracer reaps a killed process, the
# kernel does not report its end to its parent, so a wait of the parent blocks (ptrace(2)).
cdef void tracee_reap_ended() noexcept nogil
# Repair the side effects of a stop, so that the thread continues where it would have without it. `remasked`:
# its signal mask was set by PTRACE_SETSIGMASK. Changes `regs` only; 1 if it did.
cdef bint tracee_settle(int pid, int tid, user_regs_struct *regs, bint remasked) noexcept nogil
cdef int tracee_detach(int tid) noexcept nogil
# Why PTRACE_SEIZE failed with EPERM, or why a thread does not stop. 0: it has ended or is a kernel worker;
# EAGAIN: it is exiting, but may still write its clear_child_tid; EBUSY: the thread `tracer` traces it;
# otherwise EPERM.
cdef int tracee_refusal(int pid, int tid, int *tracer) noexcept nogil
# Whether a thread sleeps in the kernel until the child of its vfork has executed or ended.
cdef bint tracee_in_vfork(int pid, int tid) noexcept nogil
# The name of a thread, at most 15 bytes; empty if it has ended.
cdef void tracee_comm(int pid, int tid, char comm[16]) noexcept nogil
