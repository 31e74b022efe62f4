from libc.stdint cimport uint64_t

from snapengine.process.shared_mm cimport kin_t
from snapengine.base.pthreads cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    REGS_BYTES = 216                # struct user_regs_struct
    FPREGS_BYTES = 512              # struct user_fpregs_struct

cdef enum phase_t:
    STOPPING
    FROZEN
    THAWED


cdef struct thread_t:
    int tid
    int process                     # the target, or one that shares its memory
    bint standing
    bint blind                      # it stands in the kernel, waiting for its vfork: without registers
    bint gone                       # ended, or of a process with another memory
    uint64_t sigmask
    uint64_t xstate_bytes
    char comm[16]


cdef struct freezer_t:
    int pid
    uint64_t limit_ns
    bint registers                  # capture them
    kin_t kin                       # processes that share the memory: they stand, too
    thread_t *threads
    int n
    int room
    char *area                      # per thread: regs, fpregs, xstate
    size_t stride
    int area_room                   # threads that `area` is made for
    uint64_t from_ns                # CLOCK_MONOTONIC at the first PTRACE_INTERRUPT
    uint64_t frozen_ns              # from then until the last thread was let go
    int err
    int at_tid                      # the thread that `err` is about
    int at_process                  # and its process
    # Under `lock`.
    pthread_mutex_t lock
    pthread_cond_t changed
    phase_t phase
    bint thaw                       # the owner wants it to run


# Thread body (arg: freezer_t, phase STOPPING): stops all threads of `pid` and of the processes that share its
# memory, takes the registers of its own, waits for `thaw` (phase FROZEN), lets all go (THAWED; `err` says
# whether it ever got there).
cdef void *hold_still(void *arg) noexcept nogil
