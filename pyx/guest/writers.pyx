# cython: cdivision=True, boundscheck=False
"""Threads that write a guest's pages in an order that `snapengine.guest.check` can verify.

Owns the threads (`snapengine.guest.thread`) and the memory that they share, which is not part of the guest's
RAM. One control thread calls the methods. They never touch the RAM, so they return even while the writers are
blocked in page faults.
"""

import time

from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.errno cimport ETIMEDOUT, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from snapengine.guest.pattern cimport pattern_of
from snapengine.guest.thread cimport (
    BATCH_NS, BIN_NS, BINS, BUCKETS, MODE_MASK, PAUSE, RUN, STALL_NS, STOP, Shared, Writer, give_command,
    join_writer, measure_tick, start_writer, wait_paused,
)
from snapengine.base.oserror cimport raise_oserror

from snapengine.base.histogram import bucket_floor

cdef extern from "guest/guestsync.h" nogil:
    uint64_t guest_load(const uint64_t *p)


cdef class GuestWriters:
    """The writers of a GuestMemory, paused until the first `resume()`.

    Parameters
    ----------
    memory : GuestMemory
        It cannot be closed before the writers.
    rate : int | None
        Pages per second of all threads together; None: no limit; 0: none.
    """
    cdef readonly object params
    cdef readonly object rate
    cdef readonly bint paused
    cdef readonly int64_t started_ns      # CLOCK_MONOTONIC
    cdef object view                      # a memoryview of the RAM, referenced while threads run
    cdef Shared *shared
    cdef bint referenced
    cdef uint32_t alive                   # threads that were created and not yet joined

    def __cinit__(self, memory not None, rate=None):
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS
        cdef void *block = mmap(NULL, sizeof(Shared), PROT_READ | PROT_WRITE, flags, -1, 0)
        if block == MAP_FAILED:
            raise_oserror(errno, "mmap")
        self.shared = <Shared *>block
        memset(block, 0, sizeof(Shared))  # touched here, and not in a timed write
        self.view = memoryview(memory)
        self.params = memory.params
        self.rate = rate
        self.shared.pattern = pattern_of(memory.params)
        self.shared.ram = <uint64_t *><uint64_t>memory.addr

    def __init__(self, memory, rate=None):
        cdef Shared *s = self.shared
        cdef int err
        if self.alive:
            raise RuntimeError("the writers were already started")
        if rate is not None and (type(rate) is not int or rate < 0):
            raise ValueError("rate: must be pages per second, 0 or more, or None")
        with nogil:
            s.ns_per_tick = measure_tick()
        s.stall_ticks = <uint64_t>(STALL_NS / s.ns_per_tick)
        s.interval_ns = 1e9 * s.pattern.threads / rate if rate else 0.0
        s.batch = 1 + <uint64_t>(BATCH_NS / s.interval_ns) if rate else 64
        s.command = PAUSE
        self.paused = True
        self.started_ns = time.monotonic_ns()
        # Without close() the threads and their RAM leak, but nothing crashes, not even at exit.
        Py_INCREF(self.view)
        self.referenced = True
        for t in range(s.pattern.threads):
            err = start_writer(s, t)
            if err:
                self.close()
                raise_oserror(err, "pthread_create")
            self.alive += 1

    def pause(self, timeout: float = 5.0):
        """Pause the writers; returns when each is between two writes.

        Raises
        ------
        TimeoutError
            A writer did not pause within `timeout` seconds because it is blocked in a page fault. All
            writers are resumed.
        """
        cdef int64_t deadline = time.monotonic_ns() + <int64_t>(timeout * 1e9)
        cdef bint all_paused
        self._check()
        if self.shared.command & MODE_MASK != PAUSE:
            give_command(self.shared, PAUSE)
        with nogil:
            all_paused = wait_paused(self.shared, deadline)
        if not all_paused:
            self.paused = False
            give_command(self.shared, RUN)
            text = f"a writer did not pause within {timeout:g} s: it is blocked in a page fault"
            raise TimeoutError(ETIMEDOUT, text)
        self.paused = True

    def resume(self):
        """Resume the writers."""
        self._check()
        self.paused = False
        if self.rate != 0:
            give_command(self.shared, RUN)

    def counts(self):
        """Completed writes per thread."""
        self._check()
        return [guest_load(&self.shared.writers[t].progress) for t in range(self.shared.pattern.threads)]

    def stalls(self):
        """Writes of all threads that took more than 3 us: a dict of `count`, `sum_ns`, `max_ns` and
        `histogram`, a list of (lower bound of the bucket in ns, writes)."""
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
        """Writes of all threads per 10 ms since `since_ns`, at most of the last 80 s: a sorted list of
        (start of the bin in ns of CLOCK_MONOTONIC, writes), without empty bins."""
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
        """Stop and join the threads (idempotent). Waits for a writer that is blocked in a page fault: release
        the memory first."""
        cdef uint32_t t
        if self.shared == NULL:
            return
        give_command(self.shared, STOP)
        with nogil:
            for t in range(self.alive):
                join_writer(self.shared, t)
        self.alive = 0
        if self.referenced:
            self.referenced = False
            Py_DECREF(self.view)
        munmap(self.shared, sizeof(Shared))
        self.shared = NULL
        self.view = None

    cdef int _check(self) except -1:
        if self.shared == NULL:
            raise ValueError("the writers are closed")
        return 0

    def __dealloc__(self):
        if self.shared != NULL and not self.alive:  # else threads use it
            munmap(self.shared, sizeof(Shared))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
