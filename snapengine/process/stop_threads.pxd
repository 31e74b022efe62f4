from libc.stdint cimport uint32_t, uint64_t

from snapengine.process.shared_mm cimport sharers_t

cdef enum:
    REGS_BYTES = 216                # struct user_regs_struct
    FPREGS_BYTES = 512              # struct user_fpregs_struct

cdef enum phase_t:
    STOPPING
    STOPPED
    RESUMED


cdef struct thread_t:
    int tid
    int process                     # the target, or one that shares its memory
    bint stopped
    bint in_vfork                   # it waits in the kernel for the child of its vfork: no registers
    bint gone                       # it has ended, or its process has other memory
    uint64_t sigmask
    uint64_t xstate_bytes
    char comm[16]


cdef struct freezer_t:
    int owner                       # this process
    int pid
    uint64_t limit_ns
    bint registers                  # whether to read them
    sharers_t sharers               # processes that share the memory, which are stopped too
    thread_t *threads
    int n
    int room
    char *area                      # per thread: regs, fpregs, xstate
    size_t stride
    int area_room                   # threads that `area` is made for
    uint64_t from_ns                # CLOCK_MONOTONIC at the first PTRACE_INTERRUPT
    uint64_t stopped_ns             # from then until the last thread was resumed
    int err
    int at_tid                      # the thread that `err` is about
    int at_process                  # and its process
    # Words for snap_store_wake and snap_futex_wait: writes before the store are visible to the waiter.
    uint32_t phase                  # phase_t, set by the helper; after its end the thread sets RESUMED
    uint32_t resume                 # the owner sets it to 1 to resume the target


# Thread body (arg: freezer_t, phase STOPPING). Its helper process stops all threads of `pid` and of the
# processes that share its memory, reads the registers of `pid`'s threads, waits for `resume` (phase STOPPED),
# and resumes all (phase RESUMED). `err` says whether the stop succeeded; ECANCELED: the helper was killed,
# which ended the stop.
cdef void *stop_and_hold(void *arg) noexcept nogil
