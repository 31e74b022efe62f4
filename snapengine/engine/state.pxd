# Who writes each word that two threads share, and in which order: docs/how/threads.md.
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from snapengine.base.histogram cimport histogram_t
from snapengine.kernel.linux cimport uffd_msg
from snapengine.kernel.procmap_query cimport vma_t
from snapengine.kernel.pagemap cimport scan_t
from snapengine.pipeline.pool cimport lane_slot, pool_t
from snapengine.base.pthreads cimport pthread_cond_t, pthread_mutex_t, pthread_t

cdef enum:
    FAULT_LANES_MAX = 64
    WALKERS_MAX = 16
    UFFDS_MAX = 65                  # the target's own, and those of up to 64 live forked children
    DEFERRED_MAX = 256
    STREAMS = 8                     # sequential writers that read-around tracks at the same time

cdef enum:                          # how a region's bytes are read
    READ_MEMORY                     # loads through a pointer of this process
    READ_PROCESS                    # process_vm_readv
    READ_FILE                       # pread: a load would fill a hole, or raise SIGBUS after a truncation

cdef enum:                          # how populated pages are distinguished from holes
    PRESENCE_ALL                    # they are not: every page is read
    PRESENCE_BITS                   # by the page tables, scanned at T
    # Shared memory. Write tracking adds the pages populated before T to `present`. The other pages are looked
    # up when they are copied.
    PRESENCE_SEEK                   # SEEK_DATA of the shared file
    PRESENCE_FILE                   # SEEK_DATA of the shared file at T: `present` alone
    PRESENCE_MINCORE                # mincore of a mapping of this process: the page cache


cdef enum:                          # how a re-check finds out whether a copied page is still protected
    CHECK_SCAN                      # PAGEMAP_SCAN (Linux 6.7)
    CHECK_BITS                      # bit 57 of /proc/PID/pagemap (Linux 5.14)
    CHECK_NONE                      # it does not; the result reports that


cdef struct region_t:               # fixed before the threads start, except where noted
    uint64_t start                  # the region's bytes are [start, end), target addresses
    uint64_t end
    uint64_t addr                   # start of its first 4 KiB page
    uint64_t pages
    uint64_t first_page             # congruent to addr / 4096 modulo 512 and the unit
    uint64_t unit_pages             # smallest run that can be protected: 1, or the pages of a hugetlb page
    uint64_t track_start            # the tracked range: the pages, rounded outwards to units
    uint64_t track_end
    char *source                    # READ_MEMORY: the address in this process of page first_page
    int file                        # READ_FILE, PRESENCE_SEEK, _FILE: descriptor of this process, or -1
    uint64_t file_offset            # of page first_page
    uint64_t file_end               # the larger of its sizes before T and at T: no access beyond it
    uint64_t inode                  # of the file, 0 if there is none
    uint64_t zero_inode             # private mapping of /dev/zero (anonymous memory): the inode it shows
    char *shadow                    # hugetlb file: its shadow mapping in this process, or NULL
    # The registered range is larger than the tracked range if the mapping has grown since it was listed.
    uint64_t registered_start       # written before T
    uint64_t registered_end
    bint alone_before               # when listed: a separate mapping ended at its start
    bint alone_after                # when listed: a separate mapping began at its end
    bint follows                    # when listed: no mapping lay between it and region number - 1
    uint8_t reading
    uint8_t presence
    bint shared
    bint missing                    # register for missing faults too: its holes get no markers
    bint sparse                     # protect only the units that hold data
    bint check                      # a copy is valid only if the page is still protected after it
    bint guarded                    # it had guard pages before T (written by the walker of its first page)
    bint own                        # private mapping of a memory file: discarding a page shows the file again
    bint keep_huge                  # treat a huge page as one unit
    # Its holes fill only through page faults, which wait or are recorded. So at T `filled` says which units
    # may hold anything.
    bint holes_wait
    uint64_t first_piece            # its first piece of the first protection; written before any piece runs


cdef struct stream_t:               # read-around: one sequential writer (a hint: relaxed loads and stores)
    uint64_t next_page              # the first page after the last run
    uint64_t run_pages              # the length of that run


cdef struct lane_t:                 # one capture thread; only it writes, except where noted
    capture_t *capture
    lane_slot slot
    int index                       # 0: the first walker; then fault threads, watchdog, other walkers
    bint walks
    bint serving                    # a walker's: it serves faults now, whose writers wait
    bint has_faults_seen            # a walker's: faults_seen is valid
    uint64_t faults_seen            # a walker's: all faults served when it last counted them
    pthread_t thread
    uint64_t data_pages             # the counters: read by other threads at any time
    uint64_t zero_pages
    uint64_t hole_pages
    uint64_t lost_pages
    uint64_t faults
    uint64_t arming_faults          # faults recorded and released before T
    # When it read the messages that it handles now, in ns; 0: it handles none (seq_cst; others read it).
    uint64_t busy_since
    region_t *extent_region         # the cached result of SEEK_DATA
    uint64_t extent_start
    uint64_t extent_end
    bint extent_data
    int waiting                     # messages returned by the last read of a userfaultfd
    uint32_t n_deferred
    uffd_msg deferred[DEFERRED_MAX]  # faults to serve later: read along with events, or while T was fixed
    uint32_t deferred_uffd[DEFERRED_MAX]
    scan_t scan
    histogram_t histogram


cdef struct parallel_t:             # engine/parallel: arming in pieces by all walkers. Under capture.lock.
    pthread_cond_t wanted           # pieces are available, or arming has ended: the other walkers wait here
    pthread_cond_t done             # the last piece is done: the first walker waits here
    void *work                      # the function to call for each piece
    uint64_t pieces                 # the number of pieces
    uint64_t taken                  # the number of pieces that were taken
    uint64_t busy                   # the number of walkers that work on a piece
    uint64_t spin_until_ns          # until then walkers wait without sleeping; 0: the pause has not begun
    int spin_cpu                    # the CPU of the first walker when the pause began
    bint cpus_scarce                # fixed: there are no more usable CPUs than walkers
    uint64_t span_pages             # fixed: page numbers in a piece of a scan


cdef struct prearm_t:               # engine/prearm, engine/reprotect: two-step arming
    bint enabled                    # fixed: protect while the target runs; at T only what was written since
    uint64_t active                 # atomic (seq_cst): faults are recorded and released (first walker writes)
    uint64_t *dirty                 # by page: released before T; read when no fault thread is busy
    uint64_t *dirty_units           # by page >> 9: a page of it is in `dirty`
    uint64_t piece_pages            # fixed: page numbers in a piece of the second protection


cdef struct polling_t:              # engine/polling: the first walker reads faults itself
    uint64_t every_pages            # fixed: pages between two polls; 0: it never polls
    uint64_t polled_ns              # atomic: the time of its last poll; 0: it does not poll (first walker)
    uint64_t wake_requested         # atomic: fault threads shall serve, too (any thread: 1, first walker: 0)
    uint64_t not_before_ns          # no poll before this time (first walker alone)
    uint64_t wakeups                # how often the fault threads were woken (first walker)


cdef struct readaround_t:           # engine/readaround: any fault thread, relaxed; all words are hints
    stream_t streams[STREAMS]
    uint64_t next_stream
    uint64_t last_fault_ns
    uint64_t gap_ns                 # moving average of the time between two faults


cdef struct vma_table_t:            # engine/vma_table: the mappings at T
    vma_t *vmas                     # NULL: there is no table, each mapping is looked up in the kernel
    uint64_t room                   # entries allocated
    uint64_t n                      # entries used; written by the first walker, right after T


cdef struct recheck_t:              # engine/recheck: whether a copy equals the page at T
    int check_by                    # fixed: CHECK_...
    int own_pagemap                 # /proc/self/pagemap, for the shadow mappings; or -1
    uint64_t *shadowed              # by page >> 9: its shadow mapping is populated; written before `armed`
    uint64_t *invalidated           # by page: the target discarded or replaced it; any thread, atomic or
    uint64_t event_readers          # atomic: threads that read events and have not recorded their effect yet


cdef struct capture_t:
    # Fixed before the threads start.
    region_t *regions               # in ascending order of page numbers
    int n_regions
    uint32_t *by_addr               # indices into `regions`, in ascending order of addresses
    uint64_t total_pages
    uint64_t page_end               # all page numbers are below this
    uint64_t piece_bytes            # size of a piece of the first protection; larger for very large memory
    pool_t *pool
    int pid                         # 0: this process
    int pidfd
    bint attached                   # the target does not cooperate: its mappings may change at any time
    bint target_stopped             # it is stopped from before its mappings were listed until T
    int pagemap                     # /proc/PID/pagemap
    int maps                        # /proc/PID/maps
    int mem                         # /proc/PID/mem: pages that loads and process_vm_readv cannot read
    bint has_scan                   # PAGEMAP_SCAN is available (Linux 6.7)
    uint64_t guard                  # the PAGEMAP_SCAN category of guard pages (Linux 6.15), or 0
    uint64_t features
    int n_fault_lanes
    int n_lanes
    int stop_event
    int epoll
    uint64_t arm_piece              # most bytes for one protect call; 0: no limit
    bint serve_before_t             # negative controls only, see `pyx/engine/controls.h`
    bint skip_reprotect
    # Bitmaps by page number. Concurrent changes of a word are atomic or.
    uint64_t *claimed               # 0→1 once: the thread that sets the bit saves the page
    uint64_t *saved                 # set (release) after the copy: a thread that has seen it may unprotect
    uint64_t *lost
    uint64_t *present               # populated at T: written by walkers until `armed`, read after
    uint64_t *huge                  # by page >> 9: a huge page; like `present`, also read as a hint before
    uint64_t *guards                # no access at T, though the file may have data: like `present`
    uint64_t *own_copies            # dirty logging: copied as the target's own page, not its file's
    uint64_t *unregistered          # by page >> 9: unregistered by a walker; read when all have ended
    # By page >> 9: the unit may hold something. Of other units no word of the bitmaps by page is ever written
    # or needs to be read. Atomic or, before `armed`. All bits are set from the start, except those of regions
    # with `holes_wait`.
    uint64_t *filled
    uint64_t *data                  # dirty logging: the page's last version is a data page
    # Under `lock`.
    pthread_mutex_t lock
    pthread_cond_t changed          # one of the words below has changed; not those of `parallel`
    uint64_t ready                  # atomic: the caller may request T (first walker writes, once)
    uint64_t go                     # atomic: the caller requests T (caller, once)
    uint64_t armed                  # atomic: T is fixed (first walker writes, once)
    uint64_t hold                   # the walk waits until the target runs again (caller)
    uint64_t finished               # atomic: everything is released, no thread touches the target
    uint64_t failed                 # atomic: 0 or the errno of the first failure; any thread, once
    const char *failed_call         # written by the thread that set `failed`, before `finished`
    uint64_t failed_addr
    uint64_t stopping               # atomic: the other threads leave (first walker; caller, if it never ran)
    uint64_t n_uffds                # atomic: grows (under `lock`) as children fork
    uint64_t spare_fd               # atomic: a reserve, closed when the fd table is full; -1: used up
    int *uffds                      # closed by the first walker, or Session.close; -1 then
    uint64_t n_registered           # regions registered by this capture (first walker writes)
    uint64_t running                # atomic: fault threads and watchdog that have not left (each, once)
    uint64_t walking                # atomic: walkers beside the first that have not left (each, once)
    uint64_t next_unit              # atomic: units of 512 pages taken by walkers (compare-and-swap)
    uint64_t late                   # missing faults on pages that exist already: fault threads, relaxed
    uint64_t arm_ns
    uint64_t pause_ns               # the part of arm_ns in which no fault is served
    uint64_t t_ns                   # CLOCK_MONOTONIC at T
    uint64_t rounds
    lane_t *lanes
    # State that belongs to one module each.
    parallel_t parallel
    prearm_t prearm
    polling_t polling
    readaround_t readaround
    vma_table_t vma_table
    recheck_t recheck


# Record a failure, of which the first counts, and wake all waiting threads.
cdef void capture_fail(capture_t *capture, int err, const char *call, uint64_t addr) noexcept nogil
# The region whose tracked range holds `addr`, or NULL.
cdef region_t *region_at(capture_t *capture, uint64_t addr) noexcept nogil
# The index in `by_addr` of the first region whose tracked range ends beyond `addr`; n_regions if none does.
cdef int place_of(capture_t *capture, uint64_t addr) noexcept nogil
cdef region_t *region_by_addr(capture_t *capture, int place) noexcept nogil
# Set pages [first, first + n) in `present`, and their units in `filled`.
cdef void note_present(capture_t *capture, uint64_t first, uint64_t n) noexcept nogil
# Set the units of pages [first, first + n) in `filled`.
cdef void note_filled(capture_t *capture, uint64_t first, uint64_t n) noexcept nogil
# The next run of pages in [page, end) whose units are in `filled`; False if there is none.
cdef bint next_filled(capture_t *capture, uint64_t *page, uint64_t end, uint64_t *run_end) noexcept nogil
# Clear bits of a bitmap by page. Words of units that are not in `filled` are not touched.
cdef void clear_pages(capture_t *capture, uint64_t *bits, uint64_t first, uint64_t n) noexcept nogil
cdef uint64_t page_addr(region_t *region, uint64_t page) noexcept nogil
# The page of a fault. The kernel may report the start of a huge page, which can lie before the region.
cdef uint64_t page_at(region_t *region, uint64_t addr) noexcept nogil
