"""Arming: register, protect, fix T, scan. No page is saved before the last protect call has returned.

With two-step arming (`pyx/engine/prearm`) the first protection runs while faults are recorded and released,
and T follows a second protection of the recorded pages. Otherwise T is when all memory is protected.

Runs on the first walker. It registers all regions itself; the rest is done in pieces by all walkers
(`pyx/engine/parallel`).
"""

from libc.errno cimport ENXIO, errno
from posix.unistd cimport lseek

from snapengine.base.atomics cimport snap_load, snap_store, snap_store_seq
from snapengine.base.bitmap cimport bits_test
from snapengine.engine.prearm cimport prearm_stop
from snapengine.engine.protect cimport protect_range
from snapengine.engine.reprotect cimport reprotect_pieces, note_filled_holes, reprotect, share_edges
from snapengine.kernel.linux cimport UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
from snapengine.kernel.procmap_query cimport next_vma, same_vma, vma_t
from snapengine.engine.parallel cimport run_parallel, begin_spinning, spans
from snapengine.engine.populated cimport scan_at_t, scan_before
from snapengine.base.pthreads cimport (
    pthread_cond_broadcast, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock, snap_now_ns,
)
from snapengine.engine.state cimport capture_fail, note_filled, place_of, region_by_addr, region_t
from snapengine.engine.recheck cimport note_again, note_at_t, note_before
from snapengine.engine.vma_table cimport note_vmas
from snapengine.kernel.uffd cimport register_mapped, uffd_protect, uffd_register, uffd_unregister

cdef extern from "<unistd.h>" nogil:
    const int SEEK_DATA

cdef uint64_t PAGE = 4096
cdef uint64_t UNIT = 2 << 20
cdef uint64_t CALL_BYTES = 256 << 10    # one protect call costs as much as protecting so many bytes


cdef int _protect_sparse(capture_t *capture, lane_t *lane, region_t *region, bint again) noexcept nogil:
    """Protect the 2 MiB units of a file that hold data. Protecting a hole of shared memory fills its page
    tables with markers: 128 MiB of them and half a second for 64 GiB. The holes are registered for missing
    faults, which wait until T like all others. So no hole can fill meanwhile, except through the file or by
    another process. `again`: protect only the units that have filled since."""
    cdef uint64_t size = region.pages * PAGE
    cdef uint64_t offset = 0
    cdef uint64_t begin, end, first
    cdef long data
    cdef int err
    while offset < size and not snap_load(&capture.failed):
        data = lseek(region.file, region.file_offset + offset, SEEK_DATA)
        if data < 0 and errno == ENXIO:
            return 0
        begin = 0 if data < 0 else <uint64_t>data - region.file_offset
        if begin >= size:
            return 0
        begin = (region.addr + begin) & ~(UNIT - 1)
        end = size + region.addr if data < 0 else begin + UNIT
        begin = max(begin, region.addr)
        end = min(end, region.addr + size)
        offset = end - region.addr
        first = region.first_page + (begin - region.addr) // PAGE
        if again and bits_test(capture.filled, first >> 9):
            continue
        note_filled(capture, first, (end - begin) // PAGE)
        err = protect_range(capture, lane, begin, end - begin)
        if err:
            return err
    return 0


cdef uint64_t _free_until(capture_t *capture, uint64_t addr, uint64_t end) noexcept nogil:
    """The start of the first region that begins in [addr, end); `end` if none does."""
    cdef int place = place_of(capture, addr)
    while place < capture.n_regions and region_by_addr(capture, place).track_start < addr:
        place += 1
    return min(end, region_by_addr(capture, place).track_start) if place < capture.n_regions else end


cdef uint64_t _free_from(capture_t *capture, uint64_t start, uint64_t addr) noexcept nogil:
    """The end of the last region that ends in [start, addr); `start` if none does."""
    cdef int place = place_of(capture, addr)        # the regions before it end at `addr` or below
    return max(start, region_by_addr(capture, place - 1).track_end) if place else start


cdef void _register_growth(capture_t *capture, region_t *region, uint64_t mode) noexcept nogil:
    """The mapping may have grown while it was registered, and so consist of two parts. If both parts are
    registered in the same way, the kernel merges them again."""
    cdef vma_t inner, outer
    cdef uint64_t edge = region.track_end
    if not region.alone_after and not next_vma(capture.maps, edge, &outer) and outer.start <= edge \
            and not next_vma(capture.maps, edge - PAGE, &inner) and same_vma(&inner, &outer):
        edge = _free_until(capture, outer.start, outer.end)
        if edge > outer.start and not uffd_register(capture.uffds[0], outer.start, edge - outer.start, mode):
            region.registered_end = max(region.registered_end, edge)
    edge = region.track_start
    if not region.alone_before and not next_vma(capture.maps, edge - PAGE, &outer) and outer.start < edge \
            and not next_vma(capture.maps, edge, &inner) and same_vma(&outer, &inner):
        edge = _free_from(capture, outer.start, outer.end)
        if edge < outer.end and not uffd_register(capture.uffds[0], edge, outer.end - edge, mode):
            region.registered_start = min(region.registered_start, edge)


cdef int register_attached(capture_t *capture, region_t *region, uint64_t mode) noexcept nogil:
    cdef uint64_t start = region.track_start
    cdef uint64_t end = region.track_end
    cdef int err
    cdef vma_t vma
    if capture.target_stopped and not uffd_register(capture.uffds[0], start, end - start, mode):
        return 0                        # no mapping can have grown
    err = next_vma(capture.maps, start, &vma)
    if not err and vma.start < start:
        start = _free_from(capture, vma.start, start)
    if not err and vma.end < end:       # the region spans several mappings
        err = next_vma(capture.maps, end - PAGE, &vma)
    if not err and vma.end > end:
        end = _free_until(capture, end, vma.end)
    err = uffd_register(capture.uffds[0], start, end - start, mode)
    if err:
        err = register_mapped(capture.uffds[0], capture.maps, &capture.failed, region.track_start,
                              region.track_end - region.track_start, region.unit_pages * PAGE, mode)
    else:
        region.registered_start = min(region.registered_start, start)
        region.registered_end = max(region.registered_end, end)
    if not err:
        _register_growth(capture, region, mode)
    return err


cdef int register_region(capture_t *capture, region_t *region) noexcept nogil:
    cdef uint64_t mode = UFFDIO_REGISTER_MODE_WP
    cdef uint64_t length = region.track_end - region.track_start
    cdef int err
    if region.missing and (region.shared or capture.data == NULL):
        mode |= UFFDIO_REGISTER_MODE_MISSING
    elif capture.pid and capture.data == NULL:
        # A peer may have registered this memory for missing faults itself. With WP_UNPOPULATED its holes get
        # markers, which UFFDIO_ZEROPAGE cannot fill (EEXIST): a missing fault could never be resolved.
        uffd_unregister(capture.uffds[0], region.track_start, length)
    if capture.attached:
        err = register_attached(capture, region, mode)
    else:
        err = uffd_register(capture.uffds[0], region.track_start, length, mode)
    if err:
        capture_fail(capture, err, "UFFDIO_REGISTER", region.track_start)
    return err


cdef bint _joins_previous(capture_t *capture, int number) noexcept nogil:
    """Whether one call may take a region together with the one before it, which takes a quarter of the time.
    Only while the target is stopped, since then no other mapping can appear between them, and only for
    private memory with small pages, which is all registered in the same mode."""
    cdef region_t *region = &capture.regions[number]
    return capture.target_stopped and not capture.arm_piece and region.follows \
        and _is_plain(region) and _is_plain(region - 1)


cdef bint _is_plain(region_t *region) noexcept nogil:
    return region.missing and not region.shared and region.unit_pages == 1


cdef uint64_t _n_pieces(capture_t *capture, region_t *region) noexcept nogil:
    """A sparse file is one piece, since its data is searched in order. So is memory with pages larger than a
    piece."""
    cdef uint64_t piece = capture.piece_bytes
    if region.sparse or region.unit_pages * PAGE > piece:
        return 1
    return (region.track_end + piece - 1) // piece - region.track_start // piece


cdef uint64_t _number_pieces(capture_t *capture) noexcept nogil:
    """Give each region the number of its first piece. Small neighbours, which are one piece each, share a
    piece as long as their calls take no longer than protecting a piece of full size."""
    cdef uint64_t pieces = 0
    cdef uint64_t room = 0              # bytes left in the last piece
    cdef uint64_t n, size
    cdef int i
    cdef region_t *region
    for i in range(capture.n_regions):
        region = &capture.regions[i]
        n = _n_pieces(capture, region)
        size = max(region.track_end - region.track_start, CALL_BYTES)
        if n == 1 and not region.sparse and size <= room:
            room -= size
            region.first_piece = pieces - 1
            continue
        region.first_piece = pieces
        pieces += n
        room = 0
        if n == 1 and not region.sparse and size < capture.piece_bytes:
            room = capture.piece_bytes - size
    return pieces


cdef void _protect_region_piece(capture_t *capture, lane_t *lane, region_t *region,
                                uint64_t number) noexcept nogil:
    # Pieces end at multiples of their size: a protect call that ends inside a huge page splits it.
    cdef uint64_t piece = capture.piece_bytes
    cdef uint64_t addr = (region.track_start // piece + number) * piece
    cdef uint64_t start = max(addr, region.track_start)
    if region.sparse:
        _protect_sparse(capture, lane, region, False)
    elif _n_pieces(capture, region) == 1:
        protect_range(capture, lane, region.track_start, region.track_end - region.track_start)
    else:
        protect_range(capture, lane, start, min(addr + piece, region.track_end) - start)


cdef int _first_of_piece(capture_t *capture, uint64_t piece) noexcept nogil:
    """The index of the first region that has bytes in a piece."""
    cdef int low = 0
    cdef int high = capture.n_regions
    cdef int middle
    cdef region_t *region
    while low < high:
        middle = (low + high) // 2
        region = &capture.regions[middle]
        if region.first_piece + _n_pieces(capture, region) <= piece:
            low = middle + 1
        else:
            high = middle
    return low


cdef int _run_in_piece(capture_t *capture, int first, uint64_t piece) noexcept nogil:
    """The end of the run of regions that begins with `first`, lies inside one piece, and can be protected by
    one call."""
    cdef int end = first + 1
    while end < capture.n_regions and capture.regions[end].first_piece == piece \
            and _joins_previous(capture, end):
        end += 1
    return end


cdef void _protect_piece(capture_t *capture, lane_t *lane, uint64_t piece) noexcept nogil:
    cdef int i = _first_of_piece(capture, piece)
    cdef int end
    while i < capture.n_regions and capture.regions[i].first_piece <= piece \
            and not snap_load(&capture.failed):
        end = _run_in_piece(capture, i, piece)
        if end > i + 1 and not uffd_protect(capture.uffds[0], capture.regions[i].track_start,
                                            capture.regions[end - 1].track_end
                                            - capture.regions[i].track_start):
            i = end
            continue
        # If that failed (before Linux 6.4 a call takes a single mapping), protect them one by one. The errors
        # of these calls count.
        while i < end:
            _protect_region_piece(capture, lane, &capture.regions[i], piece - capture.regions[i].first_piece)
            i += 1


cdef int _register_all(capture_t *capture) noexcept nogil:
    cdef uint64_t mode = UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING
    cdef uint64_t start
    cdef int i = 0
    cdef int end
    while i < capture.n_regions:
        end = i + 1
        while end < capture.n_regions and _joins_previous(capture, end):
            end += 1
        start = capture.regions[i].track_start
        if end > i + 1 and not uffd_register(capture.uffds[0], start,
                                             capture.regions[end - 1].track_end - start, mode):
            i = capture.n_registered = end
        while i < end:
            if snap_load(&capture.failed) or register_region(capture, &capture.regions[i]):
                return 1
            i += 1
            capture.n_registered = i    # regions that are not registered are never unregistered
    return 0


cdef uint64_t _await_caller(capture_t *capture) noexcept nogil:
    """Announce that T can be requested, and wait until the caller requests it. Returns the nanoseconds
    waited."""
    cdef uint64_t begin = snap_now_ns()
    pthread_mutex_lock(&capture.lock)
    snap_store(&capture.ready, 1)
    pthread_cond_broadcast(&capture.changed)
    while not snap_load(&capture.go) and not snap_load(&capture.failed):
        pthread_cond_wait(&capture.changed, &capture.lock)
    pthread_mutex_unlock(&capture.lock)
    return snap_now_ns() - begin


cdef void _begin_prearming(capture_t *capture) noexcept nogil:
    pthread_mutex_lock(&capture.lock)
    snap_store_seq(&capture.prearm.active, 1)
    pthread_cond_broadcast(&capture.changed)
    pthread_mutex_unlock(&capture.lock)


cdef bint _scan_succeeded(capture_t *capture, int err) noexcept nogil:
    if err:
        capture_fail(capture, err, "scan of the page tables", 0)
    return not snap_load(&capture.failed)


cdef void _fix_t(capture_t *capture, lane_t *lane, uint64_t pieces) noexcept nogil:
    """With two-step arming this runs after the caller has requested T."""
    cdef int i
    if not capture.prearm.enabled:
        run_parallel(capture, lane, _protect_piece, pieces)
        return
    for i in range(capture.n_regions):
        if capture.regions[i].sparse:
            _protect_sparse(capture, lane, &capture.regions[i], True)
    note_again(capture)             # before pre-arming ends: from then on faulting writers wait
    prearm_stop(capture)
    note_filled_holes(capture)
    if not snap_load(&capture.failed):
        share_edges(capture)
        run_parallel(capture, lane, reprotect, reprotect_pieces(capture))


cdef int arm(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef uint64_t pieces = _number_pieces(capture)
    cdef uint64_t waited = 0
    cdef uint64_t begin, pause, now
    if not capture.prearm.enabled:
        _await_caller(capture)
    begin = pause = snap_now_ns()
    # Register first: from then on no hole of shared memory fills without a fault, which waits or is recorded.
    if _register_all(capture):
        return 1
    if capture.prearm.enabled:
        _begin_prearming(capture)   # before the scan: a page that appears after the scan is recorded as dirty
    if not _scan_succeeded(capture, note_before(capture)):
        return 1
    run_parallel(capture, lane, scan_before, spans(capture))
    if capture.prearm.enabled and not snap_load(&capture.failed):
        run_parallel(capture, lane, _protect_piece, pieces)
        waited = _await_caller(capture)
        pause = snap_now_ns()
        begin_spinning(capture)
    if not snap_load(&capture.failed):
        _fix_t(capture, lane, pieces)
    capture.t_ns = snap_now_ns()
    if snap_load(&capture.failed) or not _scan_succeeded(capture, note_vmas(capture) or note_at_t(capture)):
        return 1
    run_parallel(capture, lane, scan_at_t, spans(capture))
    now = snap_now_ns()
    capture.pause_ns = now - pause
    capture.arm_ns = now - begin - waited
    return snap_load(&capture.failed) != 0
