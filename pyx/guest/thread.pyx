# cython: cdivision=True, boundscheck=False
"""The writer threads of a guest: their loop, and how they are paused and stopped.

The threads hold no Python state, block all signals, allocate nothing and take no lock. A thread that faults
on a protected page sleeps in the kernel; the others go on.

Each shared word has one kind of writer:
    control thread: command (generation << 2 | mode)
    writer thread:  its own progress, ack and counters; `acks`, which every writer increments

Pause: the control thread stores a new command. A writer that reads it between two writes stores it into its
`ack`, increments `acks` and sleeps until the command changes. The control thread waits until every ack equals
the command. The generation tells an ack of an earlier pause from a new one. Both sides sleep by futex on the
value that they have read, so no wake-up is lost.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t

from snapengine.base.histogram cimport bucket_of
from snapengine.base.pthreads cimport pthread_join, snap_thread_start
from snapengine.guest.pattern cimport CLOCK_WORD, LAST_WORD, MAX_THREADS, PAGE_WORDS, page_of_write

cdef extern from "guest/guestsync.h" nogil:
    uint64_t guest_load(const uint64_t *p)
    void guest_store(uint64_t *p, uint64_t v)
    uint32_t guest_load32(const uint32_t *p)
    void guest_store32(uint32_t *p, uint32_t v)
    void guest_add32(uint32_t *p, uint32_t v)
    void guest_put(uint64_t *p, uint64_t v)
    void guest_wait(uint32_t *p, uint32_t value, int64_t deadline_ns)
    void guest_wake(uint32_t *p)
    int64_t guest_now_ns()
    uint64_t guest_ticks()

cdef void write_mark(Shared *s, Writer *w, uint64_t k, uint64_t *page) noexcept nogil:
    cdef uint64_t[MAX_THREADS] clock
    cdef uint32_t u
    for u in range(s.pattern.threads):
        clock[u] = guest_load(&s.writers[u].progress)
    guest_put(page, k)
    for u in range(s.pattern.threads):
        guest_put(page + CLOCK_WORD + u, clock[u])
    guest_put(page + LAST_WORD, k)
    guest_store(&w.progress, k)


cdef void count_stall(const Shared *s, Writer *w, uint64_t ticks) noexcept nogil:
    cdef uint64_t ns = <uint64_t>(ticks * s.ns_per_tick)
    w.stalls += 1
    w.stalled_ns += ns
    if ns > w.max_ns:
        w.max_ns = ns
    w.histogram[bucket_of(ns)] += 1


cdef void next_bin(const Shared *s, Writer *w, uint64_t ticks) noexcept nogil:
    # Computed from the clock at every bin, so that the error of ns_per_tick does not accumulate.
    cdef int64_t now = guest_now_ns()
    w.bin_end = ticks + <uint64_t>((BIN_NS - now % BIN_NS) / s.ns_per_tick)
    if w.bin_at != <uint64_t>(now // BIN_NS):  # equal if the tick counter was slightly ahead of the clock
        w.bin_at = now // BIN_NS
        guest_store(&w.bins[w.bin_at % BINS], w.bin_at << 24)


cdef void write_one(Shared *s, Writer *w) noexcept nogil:
    cdef uint64_t k = w.progress + 1
    cdef uint64_t *page = s.ram + page_of_write(&s.pattern, w.index, k) * PAGE_WORDS
    cdef uint64_t begin = guest_ticks(), end
    cdef uint64_t *bin
    write_mark(s, w, k, page)
    end = guest_ticks()
    if end - begin > s.stall_ticks:
        count_stall(s, w, end - begin)
    if end >= w.bin_end:
        next_bin(s, w, end)
    bin = &w.bins[w.bin_at % BINS]
    guest_store(bin, bin[0] + 1)


cdef void pace(Shared *s, Writer *w, uint32_t command) noexcept nogil:
    """Refill the budget, or sleep until the next batch is due. The caller then reads the command again."""
    cdef int64_t now
    cdef int64_t batch_ns
    if s.interval_ns == 0:
        w.budget = s.batch
        return
    now = guest_now_ns()
    if now < w.due_ns:
        guest_wait(&s.command, command, w.due_ns)
        return
    batch_ns = <int64_t>(s.batch * s.interval_ns)
    w.budget = s.batch
    w.due_ns += batch_ns
    # The due time is absolute, so that late wake-ups do not accumulate. But writes lost in a stall are not
    # made up for: a higher rate afterwards would hide the loss.
    if w.due_ns + 2 * batch_ns < now:
        w.due_ns = now


cdef void pause_here(Shared *s, Writer *w, uint32_t command) noexcept nogil:
    guest_store32(&w.ack, command)
    guest_add32(&s.acks, 1)
    guest_wake(&s.acks)
    guest_wait(&s.command, command, INT64_MAX)
    w.due_ns = guest_now_ns()


cdef void *writer_main(void *argument) noexcept nogil:
    cdef Writer *w = <Writer *>argument
    cdef Shared *s = w.shared
    cdef uint32_t command
    while True:
        command = guest_load32(&s.command)
        if command & MODE_MASK == STOP:
            return NULL
        if command & MODE_MASK == PAUSE:
            pause_here(s, w, command)
        elif w.budget == 0:
            pace(s, w, command)
        else:
            w.budget -= 1
            write_one(s, w)


cdef double measure_tick() noexcept nogil:
    """Nanoseconds per tick of the time-stamp counter, whose rate is constant on current x86-64."""
    cdef int64_t from_ns = guest_now_ns()
    cdef uint64_t from_ticks = guest_ticks()
    cdef uint32_t word = 0
    while guest_now_ns() < from_ns + BIN_NS:
        guest_wait(&word, 0, from_ns + BIN_NS)
    return <double>(guest_now_ns() - from_ns) / <double>(guest_ticks() - from_ticks)


cdef int start_writer(Shared *s, uint32_t index) noexcept nogil:
    cdef Writer *w = &s.writers[index]
    w.shared = s
    w.index = index
    w.ack = STOP  # never a command that a writer acknowledges
    return snap_thread_start(&w.thread, writer_main, w)


cdef void join_writer(Shared *s, uint32_t index) noexcept nogil:
    pthread_join(s.writers[index].thread, NULL)


cdef void give_command(Shared *s, uint32_t mode) noexcept nogil:
    guest_store32(&s.command, ((s.command >> 2) + 1) << 2 | mode)
    guest_wake(&s.command)


cdef bint wait_paused(Shared *s, int64_t deadline_ns) noexcept nogil:
    cdef uint32_t seen, t, command = s.command
    while True:
        seen = guest_load32(&s.acks)
        for t in range(s.pattern.threads):
            if guest_load32(&s.writers[t].ack) != command:
                break
        else:
            return True
        if guest_now_ns() >= deadline_ns:
            return False
        guest_wait(&s.acks, seen, deadline_ns)
