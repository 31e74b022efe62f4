# The native threads of GuestWriters, and the memory that they share with the control thread.
from libc.stdint cimport int64_t, uint32_t, uint64_t

from snapengine.guest.pattern cimport MAX_THREADS, Pattern
from snapengine.base.pthreads cimport pthread_t

cdef enum:
    RUN, PAUSE, STOP                # mode: the low 2 bits of a command
    MODE_MASK = 3
    BUCKETS = 512
    BINS = 8192                     # of 10 ms: the last 80 s
    BIN_NS = 10_000_000
    STALL_NS = 3_000                # a write that takes longer counts as a stall
    BATCH_NS = 1_000_000            # throttled writers sleep about once a millisecond

cdef struct Writer:
    uint64_t progress               # completed writes; alone on its cache line
    uint64_t[7] pad
    Shared *shared
    pthread_t thread
    uint32_t index
    uint32_t ack                    # the last command for which this writer paused
    int64_t due_ns                  # throttled: when the next batch is due
    uint64_t budget                 # writes left in the batch
    uint64_t bin_end                # ticks
    uint64_t bin_at                 # CLOCK_MONOTONIC / 10 ms
    uint64_t stalls
    uint64_t stalled_ns
    uint64_t max_ns
    uint64_t[BUCKETS] histogram     # of stalled writes, ns
    uint64_t[BINS] bins             # bin_at << 24 | writes: one word, so readable at any time

cdef struct Shared:
    uint32_t command
    uint32_t acks                   # a futex word: incremented with every ack
    uint64_t *ram
    Pattern pattern
    double ns_per_tick
    uint64_t stall_ticks
    double interval_ns              # between two writes of one thread; 0: no throttle
    uint64_t batch
    Writer[MAX_THREADS] writers

cdef int start_writer(Shared *s, uint32_t index) noexcept nogil         # an errno value, or 0
cdef void join_writer(Shared *s, uint32_t index) noexcept nogil
cdef void give_command(Shared *s, uint32_t mode) noexcept nogil         # control only
cdef bint wait_paused(Shared *s, int64_t deadline_ns) noexcept nogil  # False after the deadline
cdef double measure_tick() noexcept nogil
