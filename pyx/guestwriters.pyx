# cython: cdivision=True, boundscheck=False
"""Threads that write a guest's pages in an order that a cut can be checked against (guestcheck).

Owns native threads and one block of shared words (mapped, never part of the guest's RAM). The threads hold
no Python state, block all signals, allocate nothing and take no lock; a thread that faults on a protected
page sleeps in the kernel and nobody else does. The methods are for one control thread, which never touches
the RAM either, so it goes on answering while the writers stand in faults.

Who writes what, all else only reads it:
    control: command (generation << 2 | mode)
    writer:  its progress, ack, counters; wakers (added to by every writer)

Pause: control stores a new command; a writer that meets it between two writes stores it into its `ack`,
bumps `wakers` and sleeps until the command changes. Control waits until every ack equals that command.
An ack belongs to one generation, so that of an earlier pause cannot be taken for the new one; and both
sides sleep by futex on the value they have looked at, so no wake-up is lost.
"""

from libc.errno cimport ETIMEDOUT, errno
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from snapengine.guestpattern cimport (
    CLOCK_WORD, LAST_WORD, MAX_THREADS, PAGE_WORDS, Pattern, page_of_write, pattern_of,
)
from snapengine.oserror cimport raise_oserror

cdef extern from "guestsync.h" nogil:
    ctypedef unsigned long pthread_t
    int pthread_join(pthread_t thread, void **result)
    int guest_spawn(pthread_t *thread, void *(*main)(void *) noexcept nogil, void *arg)
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
    unsigned guest_bucket(uint64_t v)

cdef enum:
    RUN, PAUSE, STOP                # mode: the low 2 bits of a command
    MODE_MASK = 3
    BUCKETS = 512
    BINS = 8192                     # of 10 ms: the last 80 s
    BIN_NS = 10_000_000
    STALL_NS = 3_000                # a slower write counts as stalled
    BATCH_NS = 1_000_000            # throttled writers sleep about once a millisecond

cdef struct Writer:
    uint64_t progress               # writes completed; on a cache line of its own
    uint64_t[7] pad
    Shared *shared
    pthread_t thread
    uint32_t index
    uint32_t ack                    # the last command that this writer stood still for
    int64_t due_ns                  # throttled: when the next batch is due
    uint64_t budget                 # writes left in the batch
    uint64_t bin_end                # ticks
    uint64_t bin_at                 # 10 ms of CLOCK_MONOTONIC since 0
    uint64_t stalls
    uint64_t stalled_ns
    uint64_t max_ns
    uint64_t[BUCKETS] histogram     # of stalled writes, ns
    uint64_t[BINS] bins             # bin_at << 24 | writes, in one word: readable at any time

cdef struct Shared:
    uint32_t command
    uint32_t wakers
    uint64_t *ram
    Pattern pattern
    double ns_per_tick
    uint64_t stall_ticks
    double interval_ns              # between two writes of one thread; 0: no throttle
    uint64_t batch
    Writer[MAX_THREADS] writers


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
    w.histogram[guest_bucket(ns)] += 1


cdef void next_bin(const Shared *s, Writer *w, uint64_t ticks) noexcept nogil:
    # Set anew from the clock at every bin, so that the error of ns_per_tick does not add up.
    cdef int64_t now = guest_now_ns()
    w.bin_end = ticks + <uint64_t>((BIN_NS - now % BIN_NS) / s.ns_per_tick)
    if w.bin_at != <uint64_t>(now // BIN_NS):  # else the ticks were a little ahead of the clock
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
    """Refill the budget, or sleep towards its time. The caller looks at the command again after it."""
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
    # Absolute time, so that late wake-ups do not add up; but work lost in a stall stays lost, or the rate
    # after it would hide it.
    if w.due_ns + 2 * batch_ns < now:
        w.due_ns = now


cdef void stand(Shared *s, Writer *w, uint32_t command) noexcept nogil:
    guest_store32(&w.ack, command)
    guest_add32(&s.wakers, 1)
    guest_wake(&s.wakers)
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
            stand(s, w, command)
        elif w.budget == 0:
            pace(s, w, command)
        else:
            w.budget -= 1
            write_one(s, w)


cdef double measure_tick() noexcept nogil:
    """Nanoseconds per tick of the time-stamp counter, which is constant on every x86-64 of today."""
    cdef int64_t from_ns = guest_now_ns()
    cdef uint64_t from_ticks = guest_ticks()
    cdef uint32_t word = 0
    while guest_now_ns() < from_ns + BIN_NS:
        guest_wait(&word, 0, from_ns + BIN_NS)
    return <double>(guest_now_ns() - from_ns) / <double>(guest_ticks() - from_ticks)


cdef class GuestWriters:
    """The writers of a GuestMemory. They stand until the first `resume()`.

    Parameters
    ----------
    memory : GuestMemory
        Held (exported) until `close()`.
    rate : int | None
        Pages per second of all threads together; None: as fast as they can; 0: they never write.
    """
    cdef readonly object params
    cdef readonly object rate
    cdef readonly bint paused
    cdef readonly int64_t started_ns      # CLOCK_MONOTONIC
    cdef unsigned char[::1] ram
    cdef Shared *shared
    cdef uint32_t alive                   # threads that were created and not yet joined

    def __cinit__(self, memory not None, rate=None):
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS
        cdef void *block = mmap(NULL, sizeof(Shared), PROT_READ | PROT_WRITE, flags, -1, 0)
        if block == MAP_FAILED:
            raise_oserror(errno, "mmap")
        self.shared = <Shared *>block
        memset(block, 0, sizeof(Shared))  # touched now, not in a write that is timed
        self.ram = memory
        self.params = memory.params
        self.rate = rate
        self.shared.pattern = pattern_of(memory.params)
        self.shared.ram = <uint64_t *>&self.ram[0]

    def __init__(self, memory, rate=None):
        cdef Shared *s = self.shared
        cdef int err
        if self.alive:
            raise RuntimeError("these writers have been started")
        if rate is not None and (type(rate) is not int or rate < 0):
            raise ValueError("rate: pages per second, 0 or more, or None")
        with nogil:
            s.ns_per_tick = measure_tick()
        s.stall_ticks = <uint64_t>(STALL_NS / s.ns_per_tick)
        s.interval_ns = 1e9 * s.pattern.threads / rate if rate else 0.0
        s.batch = 1 + <uint64_t>(BATCH_NS / s.interval_ns) if rate else 64
        s.command = PAUSE
        self.paused = True
        self.started_ns = guest_now_ns()
        for t in range(s.pattern.threads):
            s.writers[t].shared = s
            s.writers[t].index = t
            s.writers[t].ack = STOP  # no command: generation 0 is PAUSE
            err = guest_spawn(&s.writers[t].thread, writer_main, &s.writers[t])
            if err:
                self.close()
                raise_oserror(err, "pthread_create")
            self.alive += 1

    cdef uint32_t _command(self, uint32_t mode) noexcept:
        cdef uint32_t command = ((self.shared.command >> 2) + 1) << 2 | mode
        guest_store32(&self.shared.command, command)
        guest_wake(&self.shared.command)
        return command

    def pause(self, timeout: float = 5.0):
        """Return when every writer stands between two writes.

        Raises
        ------
        TimeoutError
            A writer did not come to stand within `timeout` seconds (it waits in a page fault). The others
            go on writing.
        """
        cdef uint32_t command
        cdef int64_t deadline = guest_now_ns() + <int64_t>(timeout * 1e9)
        cdef bint standing
        self._check()
        if self.paused and self.shared.command & MODE_MASK == PAUSE:
            command = self.shared.command
        else:
            command = self._command(PAUSE)
        with nogil:
            standing = wait_standing(self.shared, command, deadline)
        if not standing:
            self.paused = False
            self._command(RUN)
            text = f"a writer did not stand within {timeout:g} s (it waits in a page fault)"
            raise TimeoutError(ETIMEDOUT, text)
        self.paused = True

    def resume(self):
        """Let the writers go on."""
        self._check()
        self.paused = False
        if self.rate != 0:
            self._command(RUN)

    def counts(self):
        """Writes completed so far, per thread."""
        self._check()
        return [guest_load(&self.shared.writers[t].progress) for t in range(self.shared.pattern.threads)]

    def stalls(self):
        """Figures of the writes that took more than 3 us, over all threads: a dict of `count`, `sum_ns`,
        `max_ns` and `histogram`, a list of (least ns of the bucket, writes)."""
        cdef uint64_t[BUCKETS] total
        cdef Writer *w
        cdef uint64_t count = 0, sum_ns = 0, max_ns = 0
        self._check()
        memset(total, 0, sizeof(total))
        for t in range(self.shared.pattern.threads):
            w = &self.shared.writers[t]
            count += w.stalls
            sum_ns += w.stalled_ns
            max_ns = max(max_ns, w.max_ns)
            for b in range(BUCKETS):
                total[b] += w.histogram[b]
        histogram = [(bucket_floor(b), total[b]) for b in range(BUCKETS) if total[b]]
        return {"count": count, "sum_ns": sum_ns, "max_ns": max_ns, "histogram": histogram}

    def bins(self, int64_t since_ns=0):
        """Writes of all threads per 10 ms: a list of (CLOCK_MONOTONIC ns of the bin's begin, writes), sorted,
        bins without a write left out; at most the last 80 s, from `since_ns` on."""
        cdef uint64_t packed
        self._check()
        total = {}
        for t in range(self.shared.pattern.threads):
            for b in range(BINS):
                packed = guest_load(&self.shared.writers[t].bins[b])
                if packed & 0xFFFFFF and <int64_t>(packed >> 24) * BIN_NS >= since_ns:
                    at = (packed >> 24) * BIN_NS
                    total[at] = total.get(at, 0) + (packed & 0xFFFFFF)
        return sorted(total.items())

    def close(self):
        """Stop and join the threads (idempotent). Waits for a writer that stands in a page fault: release
        the memory first."""
        cdef uint32_t t
        if self.shared == NULL:
            return
        self._command(STOP)
        with nogil:
            for t in range(self.alive):
                pthread_join(self.shared.writers[t].thread, NULL)
        self.alive = 0
        munmap(self.shared, sizeof(Shared))
        self.shared = NULL
        self.ram = None

    cdef int _check(self) except -1:
        if self.shared == NULL:
            raise ValueError("the writers are closed")
        return 0

    def __dealloc__(self):
        if self.shared != NULL and not self.alive:  # else leak it: threads use it
            munmap(self.shared, sizeof(Shared))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


cdef bint wait_standing(Shared *s, uint32_t command, int64_t deadline) noexcept nogil:
    cdef uint32_t seen, t
    while True:
        seen = guest_load32(&s.wakers)
        for t in range(s.pattern.threads):
            if guest_load32(&s.writers[t].ack) != command:
                break
        else:
            return True
        if guest_now_ns() >= deadline:
            return False
        guest_wait(&s.wakers, seen, deadline)


def bucket_of(uint64_t ns):
    """The number of the histogram bucket that counts `ns`."""
    return guest_bucket(ns)


def bucket_floor(unsigned bucket):
    """The least nanoseconds that a histogram bucket counts."""
    return bucket if bucket < 8 else (8 + bucket % 8) << (bucket // 8 - 1)
