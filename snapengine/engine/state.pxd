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
    UFFDS_MAX = 65                  # the target's, and those of 64 forked children that live
    DEFERRED_MAX = 256
    STREAMS = 8                     # sequential writers that read-around follows at one time

cdef enum:                          # where a region's bytes are read
    READ_MEMORY                     # a pointer of this process
    READ_PROCESS                    # process_vm_readv
    READ_FILE                       # pread: where a load would fill a hole, or kill us when the file is cut

cdef enum:                          # how populated pages are told from holes
    PRESENCE_ALL                    # not told: everything is read
    PRESENCE_BITS                   # the page tables as scanned at T
    # Shared memory. Write tracking adds what was populated before T to `present`; what it holds beside that
    # is asked for when it is copied.
    PRESENCE_SEEK                   # SEEK_DATA of the shared file
    PRESENCE_FILE                   # SEEK_DATA of the shared file, as it was at T: `present` alone
    PRESENCE_MINCORE                # the page cache behind a mapping of this process


cdef enum:                          # how it is told after a copy that its pages are still protected
    CHECK_SCAN                      # PAGEMAP_SCAN (Linux 6.7)
    CHECK_BITS                      # bit 57 of /proc/PID/pagemap (Linux 5.14)
    CHECK_NONE                      # not at all: the result says so


cdef struct region_t:               # fixed before the threads start
    uint64_t start                  # bytes of the region, target addresses
    uint64_t end
    uint64_t addr                   # start of its first 4 KiB page
    uint64_t pages
    uint64_t first_page             # congruent to addr / 4096 modulo 512 and the unit
    uint64_t unit_pages             # smallest run that can be protected: 1, or a hugetlb page
    uint64_t track_start            # what is registered: addr and end, rounded to units
    uint64_t track_end
    char *source                    # READ_MEMORY: where page first_page is readable
    int file                        # READ_FILE, PRESENCE_SEEK, _FILE: descriptor of this process, or -1
    uint64_t file_offset            # of page first_page
    uint64_t file_end               # its size before T or at T, the larger: behind it is no access
    uint64_t inode                  # of the file, 0 if there is none
    uint64_t zero_inode             # private mapping of /dev/zero, which is anonymous: the inode it shows
    char *shadow                    # hugetlb file: its shadow mapping in this process, or NULL
    uint64_t registered_start       # what is registered: more than what is tracked if the mapping has grown
    uint64_t registered_end         # since it was listed (written before T)
    bint alone_before               # no mapping of its own lay right before it, or after it, in that list
    bint alone_after
    bint follows                    # nor anything at all between it and the region of the number before
    uint8_t reading
    uint8_t presence
    bint shared
    bint missing                    # register for missing faults too: its holes get no markers
    bint sparse                     # protect only the units that hold data
    bint check                      # a copied page counts only if it is still protected afterwards
    bint guarded                    # it had guard pages before T (walker of its first page writes)
    bint own                        # private mapping of a memory file: what is discarded shows the file again
    bint keep_huge                  # treat huge pages as one unit
    bint holes_wait                 # its holes fill by faults alone, which wait or are recorded, so at T
    # `filled` knows which parts may hold anything
    uint64_t first_piece            # of protecting (`pyx/engine/arming`); written before there are pieces


cdef struct stream_t:               # read-around: a sequential writer (a hint: relaxed)
    uint64_t next_page              # the first page after the last run
    uint64_t run_pages              # how long that was


cdef struct lane_t:                 # one capture thread; only it writes, except where noted
    capture_t *capture
    lane_slot slot
    int index                       # 0: the first walker; then fault threads, watchdog, other walkers
    bint walks
    bint serving                    # a walker's: it serves faults, whose writers wait
    bint asked                      # a walker's: whether faults_seen says anything
    uint64_t faults_seen            # by it, when it last asked
    pthread_t thread
    uint64_t data_pages             # counters: read by others at any time
    uint64_t zero_pages
    uint64_t hole_pages
    uint64_t lost_pages
    uint64_t faults
    uint64_t arming_faults          # recorded and released before T
    uint64_t busy_since             # when the message in hand was seen, ns; 0: none (seq_cst; read by others)
    region_t *extent_region         # cached answer of SEEK_DATA
    uint64_t extent_start
    uint64_t extent_end
    bint extent_data
    int waiting                     # messages that the last read of a userfaultfd brought
    uint32_t n_deferred
    uffd_msg deferred[DEFERRED_MAX]  # faults that were read while an event had to be handled first
    uint32_t deferred_uffd[DEFERRED_MAX]
    scan_t scan
    histogram_t histogram


cdef struct parallel_t:             # engine/parallel: parts of arming for all walkers. Under capture.lock.
    pthread_cond_t wanted           # there are pieces, or arming ended: the other walkers wait here
    pthread_cond_t done             # the last piece is done: the first walker waits here
    void *work                      # what to do with each piece
    uint64_t pieces                 # how many there are
    uint64_t taken
    uint64_t busy                   # walkers that work on one
    uint64_t spin_until_ns          # until then walkers wait without sleeping; 0: the pause has not begun
    int spin_cpu                    # where the first walker ran then
    bint cpus_scarce                # fixed: no more usable CPUs than walkers
    uint64_t span_pages             # fixed: page numbers of a piece of a scan


cdef struct prearm_t:               # engine/prearm, engine/reprotect: two-step arming
    bint enabled                    # fixed: protect while the target runs; at T only what was written since
    uint64_t active                 # atomic (seq_cst): faults before T are recorded, released (walk writes)
    uint64_t *dirty                 # by page: released before T; read when no fault thread is busy
    uint64_t *dirty_units           # by page >> 9: some page of it is in `dirty`
    uint64_t piece_pages            # fixed: page numbers of a piece of the second protection


cdef struct polling_t:              # engine/polling: the first walker reads faults itself
    uint64_t every_pages            # fixed: pages between two polls; 0: it never polls
    uint64_t polled_ns              # atomic: when it last polled; 0: it does not
    uint64_t wake_requested         # atomic: the fault threads serve, too (any thread: 1, first walker: 0)
    uint64_t not_before_ns          # the first walker's own: no poll before then
    uint64_t wakeups                # how often the fault threads were woken (first walker)


cdef struct readaround_t:           # engine/readaround: any fault thread, relaxed; all of it is a hint
    stream_t streams[STREAMS]
    uint64_t next_stream
    uint64_t last_fault_ns
    uint64_t gap_ns                 # mean time between the last few faults


cdef struct vma_table_t:            # engine/vma_table: the mappings at T; NULL: the kernel is asked for each
    vma_t *vmas
    uint64_t room
    uint64_t n                      # written by the first walker, right after T


cdef struct recheck_t:              # engine/recheck: whether a copy is what the page held at T
    int check_by                    # fixed: CHECK_...
    int own_pagemap                 # this process's, for the shadow mappings; or -1
    uint64_t *shadowed              # by page >> 9: its shadow mapping is populated; written before T
    uint64_t *invalidated           # by page: the target discarded or replaced it; any thread, atomic or
    uint64_t event_readers          # atomic: threads that read events and have not recorded their effect yet


cdef struct capture_t:
    # Fixed before the threads start.
    region_t *regions               # by page number
    int n_regions
    uint32_t *by_addr               # their indices, by address
    uint64_t total_pages
    uint64_t page_end               # page numbers are below this
    uint64_t piece_bytes            # of the first protection; more where there is very much memory
    pool_t *pool
    int pid                         # 0: this process
    int pidfd
    bint attached                   # the target does not cooperate: its mappings may change at any time
    bint target_stopped             # but not between the time when they were listed and T
    int pagemap
    int maps                        # /proc/PID/maps
    int mem                         # /proc/PID/mem, for pages that loads and process_vm_readv may not read
    bint has_scan                   # PAGEMAP_SCAN (Linux 6.7)
    uint64_t guard                  # its category of guard pages (Linux 6.15), or 0
    uint64_t features
    int n_fault_lanes
    int n_lanes
    int stop_event
    int epoll
    uint64_t arm_piece              # protect in pieces of so many bytes; 0: whole regions
    bint serve_before_t             # negative controls only, see controls.h
    bint skip_reprotect
    # Bitmaps by page number; words are changed by atomic or only.
    uint64_t *claimed               # who saves the page: 0→1 once
    uint64_t *saved                 # set (release) after the copy: whoever sees it may unprotect
    uint64_t *lost
    uint64_t *present               # populated at T: written by the walk before T, read after
    uint64_t *huge                  # by page >> 9; like `present`
    uint64_t *guards                # no access at T, though the file may have data: like `present`
    uint64_t *own_copies            # dirty logging: what was copied as the target's own page, not its file's
    uint64_t *unregistered          # by page >> 9: unregistered by a walker; read when all have ended
    # By page >> 9: may hold something. Where not, no word of the bitmaps by page is ever written, or need be
    # read. Atomic or, before `armed`; all set from the start but for regions whose holes wait.
    uint64_t *filled
    uint64_t *data                  # dirty logging: the page's last version is a data page
    # Under `lock`.
    pthread_mutex_t lock
    pthread_cond_t changed          # one of the words below has changed; not those of `parallel`
    uint64_t ready                  # atomic: the caller may ask for T (walk writes, once)
    uint64_t go                     # atomic: the caller asks for T (caller, once)
    uint64_t armed                  # atomic: T is fixed (walk writes, once)
    uint64_t hold                   # the walk waits until the target runs again
    uint64_t finished               # atomic: everything is released, no thread touches the target
    uint64_t failed                 # atomic: 0 or the errno of the first failure; any thread, once
    const char *failed_call         # written by the thread that set `failed`, before `finished`
    uint64_t failed_addr
    uint64_t stopping               # atomic: fault threads leave (walk writes)
    uint64_t n_uffds                # atomic: grows (under `lock`) as children fork
    uint64_t spare_fd               # atomic: a descriptor to give up when the table is full; -1: given up
    int *uffds                      # closed by who releases: the walk, or Session.close; -1 then
    uint64_t n_registered           # regions registered by this capture (walk writes)
    uint64_t running                # atomic: fault threads and watchdog that have not left (each, once)
    uint64_t walking                # atomic: walkers beside the first that have not left (each, once)
    uint64_t next_unit              # atomic: units of 512 pages taken by walkers (compare-and-swap)
    uint64_t late                   # missing faults that were answered already: fault threads, relaxed
    uint64_t arm_ns
    uint64_t pause_ns               # the part of it in which no fault is answered
    uint64_t t_ns                   # CLOCK_MONOTONIC at T
    uint64_t rounds
    lane_t *lanes
    # What one module owns.
    parallel_t parallel
    prearm_t prearm
    polling_t polling
    readaround_t readaround
    vma_table_t vma_table
    recheck_t recheck


# The first failure of a capture wins; wakes everybody.
cdef void capture_fail(capture_t *capture, int err, const char *call, uint64_t addr) noexcept nogil
cdef region_t *region_at(capture_t *capture, uint64_t addr) noexcept nogil
# The place in `by_addr` of the first region that is tracked beyond `addr`; n_regions if none is.
cdef int place_of(capture_t *capture, uint64_t addr) noexcept nogil
cdef region_t *region_by_addr(capture_t *capture, int place) noexcept nogil
# Pages [first, first + n) hold something: in `present`, and so in `filled`; in that alone.
cdef void note_present(capture_t *capture, uint64_t first, uint64_t n) noexcept nogil
cdef void note_filled(capture_t *capture, uint64_t first, uint64_t n) noexcept nogil
# The next run of pages in [page, end) whose units may hold something: False if there is none.
cdef bint next_filled(capture_t *capture, uint64_t *page, uint64_t end, uint64_t *run_end) noexcept nogil
# Clear bits of a bitmap by page, without touching what was never written.
cdef void clear_pages(capture_t *capture, uint64_t *bits, uint64_t first, uint64_t n) noexcept nogil
cdef uint64_t page_addr(region_t *region, uint64_t page) noexcept nogil
# The page of a fault; the kernel may name the start of a huge page, which can lie before the region.
cdef uint64_t page_at(region_t *region, uint64_t addr) noexcept nogil
