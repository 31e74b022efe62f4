from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from snapengine.kernel.ptrace cimport snap_sud_config, user_regs_struct

# System calls made by a stopped thread of another process. Functions return 0 or an errno value. Between
# remote_stop and remote_release the target's thread is stopped, with registers that are not its own.


cdef enum step_t:
    # The last step of an injection: the one that failed, or STEP_DONE.
    STEP_SEIZE
    STEP_STOP
    STEP_COMPAT                     # the thread runs 32-bit code
    STEP_CALL                       # userfaultfd(2)
    STEP_PAGE                       # a page of our own in the target
    STEP_PASS                       # the device's descriptor handed over
    STEP_IOCTL                      # USERFAULTFD_IOC_NEW
    STEP_GETFD
    STEP_CLOSE
    STEP_DONE


cdef struct remote_t:
    int pid
    int tid
    uint64_t insn                   # address of a syscall instruction in the target
    uint64_t stopped_ns             # CLOCK_MONOTONIC when PTRACE_INTERRUPT was issued
    user_regs_struct saved          # its registers, to be restored
    uint64_t mask                   # its signal mask
    int scheduling                  # its policy; -1: unchanged
    snap_sud_config dispatch        # its Syscall User Dispatch


# Seize and stop the thread within `limit_ns`. On failure `step` says which step failed. A thread that did not
# stop is detached only by the end of the calling thread. `repair`: False lets the program see EINTR (tests).
cdef int remote_stop(remote_t *remote, int pidfd, int options, uint64_t limit_ns, bint repair,
                     step_t *step) noexcept nogil
# A system call with its six arguments. ETIMEDOUT: the thread did not run for `limit_ns` (frozen cgroup), and
# the call was not made.
cdef int remote_call(remote_t *remote, long call, const uint64_t *args, uint64_t limit_ns,
                     int64_t *result) noexcept nogil
# Read and write `n` words of a page that remote_call has mapped in the target. They use ptrace(2), because
# process_vm_readv(2) can fail for lack of memory: then the numbers of descriptors could not be read, and they
# would stay open there.
cdef int remote_get(remote_t *remote, uint64_t addr, uint64_t *words, size_t n) noexcept nogil
cdef int remote_put(remote_t *remote, uint64_t addr, const uint64_t *words, size_t n) noexcept nogil
cdef int remote_release(remote_t *remote) noexcept nogil
