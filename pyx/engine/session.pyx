"""One capture's state: regions, bitmaps, lanes. Created before the threads start, freed after they have
ended.

All of it lies in arenas. Capture threads write it while the target's memory is protected, and heap memory may
share pages with that.
"""

from libc.errno cimport ENOTTY
from libc.stdint cimport uint32_t, uintptr_t
from posix.unistd cimport close

import os

from snapengine.base.atomics cimport snap_load, snap_load_relaxed
from snapengine.base.nofault cimport guard_begin, guard_end
from snapengine.base.pthreads cimport pthread_cond_init, pthread_mutex_init
from snapengine.engine.counters cimport (
    count_final_pages, fault_buckets, fault_quantiles, list_lost_runs, sum_counters,
)
from snapengine.engine.state cimport (
    CHECK_BITS, CHECK_NONE, CHECK_SCAN, FAULT_LANES_MAX, PRESENCE_ALL, PRESENCE_BITS, PRESENCE_FILE,
    PRESENCE_MINCORE, PRESENCE_SEEK, READ_FILE, READ_MEMORY, READ_PROCESS, UFFDS_MAX, WALKERS_MAX,
    capture_fail, lane_t, note_filled,
)
from snapengine.kernel.pagemap cimport guard_category
from snapengine.kernel.pagemap import has_pagemap_scan, has_wp_bits
from snapengine.kernel.procmap_query cimport next_vma, vma_t
from snapengine.pipeline.pool cimport NO_SLOT, Pool

cdef extern from "engine/controls.h" nogil:
    bint snap_control(bint on)

# 128 MiB: no two spans share a word of a bitmap, even with 512 pages a bit.
cdef uint64_t SPAN_PAGES = 32768
cdef uint64_t REPROTECT_PAGES = 4096    # small enough that two walkers share a hot set of a few MiB
cdef uint64_t PIECE_PAGES = 8192    # 32 MiB: protecting 4 KiB pages takes 0.8 ms; a multiple of huge pages
cdef uint64_t PIECE_MAX_PAGES = 1 << 20     # 4 GiB: 64 ms if all of it is in use; a call cannot be cancelled
cdef uint64_t SPANS = 4096

_READING = {"memory": READ_MEMORY, "process": READ_PROCESS, "file": READ_FILE}
_PRESENCE = {
    "all": PRESENCE_ALL, "bits": PRESENCE_BITS, "seek": PRESENCE_SEEK, "mincore": PRESENCE_MINCORE,
    "file": PRESENCE_FILE,
}


cdef bint _holes_wait(region_t *region, bint rounds) noexcept nogil:
    if region.presence == PRESENCE_BITS:
        return region.missing and region.unit_pages == 1
    return region.sparse and not rounds and region.presence in (PRESENCE_SEEK, PRESENCE_FILE)


cdef uint64_t _scaled(uint64_t least, uint64_t total, uint64_t pieces, uint64_t most) noexcept nogil:
    """The pages of a piece: `least`, doubled until at most `pieces` pieces are left, or until `most` is
    reached."""
    while least * pieces < total and 2 * least <= most:
        least *= 2
    return least


cdef class Session:
    """State of one capture.

    Parameters
    ----------
    plans:
        `snapengine.regions.RegionPlan` objects: how each region is tracked and read.
    uffd:
        Descriptor of the target's userfaultfd. The session owns it once the constructor has returned.
    pid, pidfd:
        The target process and its pidfd, or 0 and -1 for this process (borrowed).
    memory_limit, fault_threads, encoders, walkers, spill_dir:
        As in `snapengine.Options`. Numbers must not be 0.
    rounds:
        Dirty logging: keep the bitmaps that its rounds need.
    sums:
        Walkers compute the checksums of the data that they save. For data that is stored uncompressed.
    attached:
        The target does not cooperate: regions may be unmapped or replaced before they are protected.
    target_stopped:
        The target is stopped from before the regions were listed until T, so that no region can change.
    two_step:
        Protect while the target runs, and at T only the pages that it has written to since.
    poll_pages:
        While writers fault, the first walker polls for faults after so many pages (a power of 2, at most 64).
        With 0 it leaves them to the fault threads. None: 32 for memory of this process, 0 otherwise (copying
        a page of another process takes twice as long, and saving took 370 instead of 278 ms with polling).

    Raises MemoryError, ValueError or OSError.
    """

    def __init__(self, list plans, int uffd, uint64_t features, int pid=0, int pidfd=-1, *,
                 uint64_t memory_limit, int fault_threads, int encoders, int walkers=1, spill_dir=None,
                 bint rounds=False, bint attached=False, bint target_stopped=False, bint sums=False,
                 bint two_step=False, bint use_scan=True, bint serve_before_t=False,
                 bint skip_reprotect=False,
                 uint64_t arm_piece=0, poll_pages=None):
        cdef capture_t *capture
        cdef int i
        if not 1 <= fault_threads <= FAULT_LANES_MAX:
            raise ValueError(f"fault_threads: {fault_threads} is not in 1 ... {FAULT_LANES_MAX}")
        if not 1 <= walkers <= WALKERS_MAX:
            raise ValueError(f"walkers: {walkers} is not in 1 ... {WALKERS_MAX}")
        poll_pages = (0 if pid else 32) if poll_pages is None else poll_pages
        if poll_pages not in (0, 1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"poll_pages: {poll_pages} is neither 0 nor a power of 2 up to 64")
        if (serve_before_t or skip_reprotect) and not snap_control(True):
            raise ValueError("this build has no negative controls (SNAPENGINE_CONTROLS)")
        self.bitmaps = []
        self.owned_fds = []
        self.fault_lanes = fault_threads
        self.walkers = walkers
        self.control = Arena(sizeof(capture_t) + len(plans) * (sizeof(region_t) + sizeof(uint32_t)))
        self.control.touch()
        self.capture = capture = <capture_t *>self.control.base
        capture.spare_fd = <uint64_t>-1
        capture.regions = <region_t *>(self.control.base + sizeof(capture_t))
        capture.by_addr = <uint32_t *>&capture.regions[len(plans)]
        capture.n_regions = len(plans)
        capture.pid = pid
        capture.pidfd = pidfd
        capture.features = features
        capture.has_scan = use_scan and has_pagemap_scan()
        capture.guard = guard_category() if capture.has_scan else 0
        without_scan = CHECK_BITS if has_wp_bits() else CHECK_NONE
        capture.recheck.check_by = CHECK_SCAN if capture.has_scan else without_scan
        capture.n_fault_lanes = fault_threads
        capture.n_lanes = fault_threads + 1 + walkers
        capture.serve_before_t = serve_before_t
        capture.prearm.enabled = two_step and not serve_before_t
        capture.skip_reprotect = skip_reprotect
        capture.arm_piece = arm_piece
        capture.polling.every_pages = poll_pages
        capture.parallel.cpus_scarce = walkers >= len(os.sched_getaffinity(0))
        capture.stop_event = -1
        capture.epoll = -1
        self.descriptors = Arena(UFFDS_MAX * sizeof(int), True)
        self.descriptors.touch()
        capture.uffds = <int *>self.descriptors.base
        for i in range(UFFDS_MAX):
            capture.uffds[i] = -1
        capture.n_uffds = 1
        pthread_mutex_init(&capture.lock, NULL)
        pthread_cond_init(&capture.changed, NULL)
        pthread_cond_init(&capture.parallel.wanted, NULL)
        pthread_cond_init(&capture.parallel.done, NULL)
        for i in range(capture.n_regions):
            self._set_region(&capture.regions[i], plans[i])
            if rounds:
                capture.regions[i].check = False    # a page written during its copy is copied again
            if serve_before_t or skip_reprotect:
                # These negative controls read everything and check nothing.
                capture.regions[i].presence = PRESENCE_ALL
                capture.regions[i].check = False
                capture.regions[i].own = False
                capture.regions[i].shadow = NULL
                capture.regions[i].keep_huge = False
            capture.regions[i].holes_wait = _holes_wait(&capture.regions[i], rounds)
        self._sort_by_addr()
        capture.attached = attached
        capture.target_stopped = target_stopped
        capture.mem = capture.maps = capture.recheck.own_pagemap = -1
        # At most a few thousand pieces, so that the unused part of a large reservation costs nothing.
        capture.parallel.span_pages = _scaled(SPAN_PAGES, capture.page_end, SPANS, PIECE_MAX_PAGES)
        capture.prearm.piece_pages = _scaled(REPROTECT_PAGES, capture.page_end, SPANS, capture.page_end)
        capture.piece_bytes = _scaled(PIECE_PAGES, capture.total_pages, SPANS, PIECE_MAX_PAGES) * 4096
        try:
            self.pool = Pool(memory_limit, capture.total_pages, fault_threads + walkers, encoders, spill_dir)
            capture.pool = self.pool.pool
            self._make_bitmaps(rounds)
            self._make_lanes(sums)
            self._open_files()
        except BaseException:
            self.close()
            raise
        capture.uffds[0] = uffd         # the session owns it from here on

    cdef int _sort_by_addr(self) except -1:
        cdef capture_t *capture = self.capture
        cdef bint ascend = True
        cdef int i
        for i in range(capture.n_regions):
            capture.by_addr[i] = i
            ascend = ascend and (i == 0 or capture.regions[i - 1].start <= capture.regions[i].start)
        if ascend:                      # as for the regions of a process
            return 0
        starts = [capture.regions[i].start for i in range(capture.n_regions)]
        for i, number in enumerate(sorted(range(capture.n_regions), key=starts.__getitem__)):
            capture.by_addr[i] = number
        return 0

    cdef int _set_region(self, region_t *region, RegionPlan plan) except -1:
        region.start = plan.region.addr
        region.end = plan.region.addr + plan.region.length
        region.addr = plan.addr
        region.pages = plan.pages
        region.first_page = plan.first_page
        region.unit_pages = plan.unit_pages
        region.track_start = plan.track_start
        region.track_end = plan.track_end
        region.source = <char *><uintptr_t>plan.source
        region.file = plan.file
        region.file_offset = plan.file_offset
        region.file_end = os.fstat(plan.file).st_size if plan.file >= 0 else 0
        region.inode = os.fstat(plan.file).st_ino if plan.file >= 0 else 0
        region.zero_inode = plan.region.zero_inode
        region.reading = _READING[plan.reading]
        region.presence = _PRESENCE[plan.presence]
        region.shared = plan.shared
        region.missing = plan.missing
        region.sparse = plan.sparse
        region.check = plan.check
        region.own = plan.own
        region.shadow = <char *><uintptr_t>plan.shadow
        region.registered_start = plan.track_start
        region.registered_end = plan.track_end
        region.alone_before = plan.alone_before
        region.alone_after = plan.alone_after
        region.follows = plan.follows
        region.keep_huge = plan.keep_huge and self.capture.has_scan
        self.capture.total_pages += region.pages
        self.capture.page_end = max(self.capture.page_end, region.first_page + region.pages)
        return 0

    cdef int _open_files(self) except -1:
        cdef capture_t *capture = self.capture
        capture.pagemap = os.open(f"/proc/{capture.pid or 'self'}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self.owned_fds.append(capture.pagemap)
        capture.mem = os.open(f"/proc/{capture.pid or 'self'}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self.owned_fds.append(capture.mem)
        if not capture.pid:
            guard_begin()
            self.guarding = True
        capture.maps = os.open(f"/proc/{capture.pid or 'self'}/maps", os.O_RDONLY | os.O_CLOEXEC)
        self.owned_fds.append(capture.maps)
        if capture.attached:
            self._make_vma_table()
        capture.recheck.own_pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self.owned_fds.append(capture.recheck.own_pagemap)
        capture.stop_event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.owned_fds.append(capture.stop_event)
        capture.spare_fd = os.dup(capture.stop_event)
        return 0

    cdef int _make_vma_table(self) except -1:
        """Allocate room for all mappings that a process may have, if the kernel cannot look up a single one
        (`pyx/engine/vma_table`)."""
        cdef vma_t first
        if next_vma(self.capture.maps, 0, &first) != ENOTTY:
            return 0
        with open("/proc/sys/vm/max_map_count", "rb") as limit:
            self.capture.vma_table.room = int(limit.read()) + 64    # [vsyscall] and the kernel's own
        self.vmas = Arena(self.capture.vma_table.room * sizeof(vma_t))
        self.capture.vma_table.vmas = <vma_t *>self.vmas.base
        return 0

    cdef uint64_t *_bitmap(self, uint64_t bits) except NULL:
        cdef Arena arena = Arena((bits + 63) // 64 * 8 + 8)
        self.bitmaps.append(arena)
        return <uint64_t *>arena.base

    cdef int _make_bitmaps(self, bint rounds) except -1:
        cdef uint64_t pages = self.capture.page_end
        cdef int i
        self.capture.claimed = self._bitmap(pages)
        self.capture.saved = self._bitmap(pages)
        self.capture.lost = self._bitmap(pages)
        self.capture.present = self._bitmap(pages)
        self.capture.huge = self._bitmap((pages >> 9) + 1)
        self.capture.guards = self._bitmap(pages)
        self.capture.unregistered = self._bitmap((pages >> 9) + 1)
        self.capture.recheck.shadowed = self._bitmap((pages >> 9) + 1)
        self.capture.recheck.invalidated = self._bitmap(pages)
        if self.capture.prearm.enabled:
            self.capture.prearm.dirty = self._bitmap(pages)
            self.capture.prearm.dirty_units = self._bitmap((pages >> 9) + 1)
        if rounds:
            self.capture.data = self._bitmap(pages)
            self.capture.own_copies = self._bitmap(pages)
        self.capture.filled = self._bitmap((pages >> 9) + 1)
        for i in range(self.capture.n_regions):
            if not self.capture.regions[i].holes_wait:
                note_filled(self.capture, self.capture.regions[i].first_page, self.capture.regions[i].pages)
        return 0

    cdef int _make_lanes(self, bint sums) except -1:
        cdef int i
        cdef int n = self.capture.n_lanes
        self.lanes = Arena(n * sizeof(lane_t))
        self.lanes.touch()
        self.capture.lanes = <lane_t *>self.lanes.base
        for i in range(n):
            self.capture.lanes[i].capture = self.capture
            self.capture.lanes[i].index = i
            self.capture.lanes[i].walks = i == 0 or i > self.fault_lanes + 1
            self.capture.lanes[i].slot.slot = NO_SLOT
            self.capture.lanes[i].slot.computes_crc = sums and self.capture.lanes[i].walks
        return 0

    def fail(self, int err, bytes call=b"cancelled"):
        """Make every thread of the capture stop and release the target. Returns at once."""
        literal = _FAILURES.setdefault(call, call)   # the C string must outlive the capture
        cdef const char *text = literal
        capture_fail(self.capture, err, text, 0)

    @property
    def failure(self):
        """(errno, call, address) of the first failure, or None."""
        cdef uint64_t err = snap_load(&self.capture.failed)
        if not err:
            return None
        call = self.capture.failed_call
        return err, (call.decode() if call != NULL else "?"), self.capture.failed_addr

    def counters(self):
        """Sums over the threads so far: data, zero, hole and lost pages, faults, faults before T."""
        return sum_counters(self.capture)

    def final_pages(self):
        """Dirty logging: pages whose last version is data, at the end of the last round."""
        return count_final_pages(self.capture)

    def fault_ns(self):
        """{"p50", "p99", "max"} of the time from reading a fault to its release, in ns."""
        return fault_quantiles(self.capture)

    def fault_histogram(self):
        """[(least ns of the bucket, faults)] of the same times, ascending, without empty buckets."""
        return fault_buckets(self.capture)

    def lost_runs(self):
        """[(address, bytes)] of memory that the target discarded or replaced before it was saved."""
        return list_lost_runs(self.capture)

    @property
    def arm_ns(self):
        """Nanoseconds from the first registration to T, without the wait for the caller."""
        return self.capture.arm_ns

    @property
    def pause_ns(self):
        """Nanoseconds up to T in which no fault was served."""
        return self.capture.pause_ns

    @property
    def t_ns(self):
        """CLOCK_MONOTONIC at T, in nanoseconds; 0: T is not fixed yet."""
        return self.capture.t_ns

    @property
    def total_pages(self):
        """Pages of all regions."""
        return self.capture.total_pages

    @property
    def rounds(self):
        """Rounds copied so far (write tracking: 1)."""
        return self.capture.rounds

    @property
    def walk_faults(self):
        """Faults that the first walker served itself, by polling."""
        return snap_load_relaxed(&self.capture.lanes[0].faults)

    @property
    def poll_wakeups(self):
        """How often the fault threads were woken while the first walker polled, as by an overdue poll."""
        return self.capture.polling.wakeups

    @property
    def has_scan(self):
        """Whether PAGEMAP_SCAN is used."""
        return self.capture.has_scan

    @property
    def checks_protection(self):
        """Whether each copy is followed by a check that its pages are still protected."""
        return self.capture.recheck.check_by != CHECK_NONE

    @property
    def armed(self):
        """Whether T is fixed."""
        return snap_load(&self.capture.armed) != 0

    def close(self):
        """Free the resources of the capture. Only after its threads have ended. Idempotent."""
        self._close_files()
        self.close_uffds()
        if self.pool is not None:
            self.pool.close()
        self.bitmaps = []

    def __del__(self):
        # KeyboardInterrupt may be raised as the constructor returns. The caller still owns the userfaultfd
        # then.
        if self.capture != NULL:
            self._close_files()

    def _close_files(self):
        fds, self.owned_fds = self.owned_fds, []
        for fd in fds:
            os.close(fd)
        if <int>self.capture.spare_fd >= 0:
            os.close(self.capture.spare_fd)
            self.capture.spare_fd = <uint64_t>-1
        if self.guarding:
            self.guarding = False
            guard_end()

    def close_uffds(self):
        """Close all userfaultfds that are still open: the kernel releases the memory that they protect. A
        forked child calls it, too: a process that holds a copy keeps the protection in place."""
        cdef int *uffds = <int *>self.descriptors.base
        cdef int i, fd
        for i in range(UFFDS_MAX):
            fd = uffds[i]
            uffds[i] = -1
            if fd >= 0:
                with nogil:
                    close(fd)


_FAILURES = {}
