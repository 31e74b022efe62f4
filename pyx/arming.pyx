"""Arming: register, protect, T, scan. Nothing is served before the last protect call has returned.

In two steps (`pyx/hits`) the first protection comes while faults are noted and let go, and T after a second
one of what was hit. Otherwise T is when all is protected.

Run by the first walker. It registers everything; the rest is done in pieces by all walkers (`pyx/pieces`).
"""

from libc.errno cimport EAGAIN, ENOENT, ENXIO, errno
from posix.unistd cimport lseek

from snapengine.atomics cimport snap_load, snap_store, snap_store_seq
from snapengine.events cimport pump
from snapengine.faults cimport serve_held
from snapengine.hits cimport hit_pieces, protect_hits, share_edges, stop_noting
from snapengine.linux cimport UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP
from snapengine.mapquery cimport next_vma, same_vma, vma_t
from snapengine.pieces cimport all_pieces, hurry, spans
from snapengine.presence cimport scan_at_t, scan_before
from snapengine.pthreads cimport (
    pthread_cond_broadcast, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock, snap_now_ns,
)
from snapengine.session cimport capture_fail, region_t
from snapengine.trust cimport note_again, note_at_t, note_before
from snapengine.uffd cimport protect_mapped, register_mapped, uffd_protect, uffd_register, uffd_unregister

cdef extern from "<unistd.h>" nogil:
    const int SEEK_DATA

cdef uint64_t PAGE = 4096
cdef uint64_t UNIT = 2 << 20
cdef uint64_t PIECE = 32 << 20      # bytes: 0.8 ms of 4 KiB pages; a multiple of the usual huge page


cdef int protect_range(capture_t *capture, lane_t *lane, uint64_t addr, uint64_t length) noexcept nogil:
    cdef uint64_t piece = capture.arm_piece if capture.arm_piece else length
    cdef uint64_t end = addr + length
    cdef int err
    while addr < end:
        err = uffd_protect(capture.uffds[0], addr, min(piece, end - addr))
        if err == ENOENT and capture.attached:
            err = protect_mapped(capture.uffds[0], addr, min(piece, end - addr))
        if err == EAGAIN:
            # A fork is under way in the target: its event must be read before anything is protected.
            # Faults that come along are kept until T, or noted at once: T may wait for their threads to
            # pause.
            if snap_load(&capture.failed):
                return err
            pump(capture, lane)
            serve_held(capture, lane)
            continue
        if err:
            capture_fail(capture, err, "UFFDIO_WRITEPROTECT", addr)
            return err
        addr += piece
    return 0


cdef int _protect_sparse(capture_t *capture, lane_t *lane, region_t *region) noexcept nogil:
    """Protect the 2 MiB units of a file that hold data. Protecting a hole of shared memory fills its
    page tables with markers: 128 MiB of them and half a second for 64 GiB. The holes are registered for
    missing faults, which wait until T like all others, so no hole can fill meanwhile."""
    cdef uint64_t size = region.pages * PAGE
    cdef uint64_t offset = 0
    cdef uint64_t begin, end
    cdef long data
    cdef int err
    while offset < size:
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
        err = protect_range(capture, lane, begin, end - begin)
        if err:
            return err
        offset = end - region.addr
    return 0


cdef uint64_t _free_until(capture_t *capture, uint64_t addr, uint64_t end) noexcept nogil:
    """Where in [addr, end) the first region begins; `end` if none does."""
    cdef int i
    for i in range(capture.n_regions):
        if addr <= capture.regions[i].track_start < end:
            end = capture.regions[i].track_start
    return end


cdef uint64_t _free_from(capture_t *capture, uint64_t start, uint64_t addr) noexcept nogil:
    """Where in [start, addr) the last region ends; `start` if none does."""
    cdef int i
    for i in range(capture.n_regions):
        if start < capture.regions[i].track_end <= addr:
            start = capture.regions[i].track_end
    return start


cdef void _take_in_growth(capture_t *capture, region_t *region, uint64_t mode) noexcept nogil:
    """What is in two by now all the same: registered alike, the parts become one again."""
    cdef vma_t inner, outer
    cdef uint64_t edge = region.track_end
    if not region.alone_after and not next_vma(capture.maps, edge - PAGE, &inner) \
            and not next_vma(capture.maps, edge, &outer) and same_vma(&inner, &outer):
        edge = _free_until(capture, outer.start, outer.end)
        if edge > outer.start and not uffd_register(capture.uffds[0], outer.start, edge - outer.start, mode):
            region.held_end = max(region.held_end, edge)
    edge = region.track_start
    if not region.alone_before and not next_vma(capture.maps, edge, &inner) \
            and not next_vma(capture.maps, edge - PAGE, &outer) and same_vma(&outer, &inner):
        edge = _free_from(capture, outer.start, outer.end)
        if edge < outer.end and not uffd_register(capture.uffds[0], edge, outer.end - edge, mode):
            region.held_start = min(region.held_start, edge)


cdef int register_attached(capture_t *capture, region_t *region, uint64_t mode) noexcept nogil:
    cdef uint64_t start = region.track_start
    cdef uint64_t end = region.track_end
    cdef int err
    cdef vma_t vma
    if not next_vma(capture.maps, start, &vma) and vma.start < start:
        start = _free_from(capture, vma.start, start)
    if not next_vma(capture.maps, end - PAGE, &vma) and vma.end > end:
        end = _free_until(capture, end, vma.end)
    err = uffd_register(capture.uffds[0], start, end - start, mode)
    if err:
        err = register_mapped(capture.uffds[0], region.track_start, region.track_end - region.track_start,
                              region.unit_pages * PAGE, mode)
    else:
        region.held_start = min(region.held_start, start)
        region.held_end = max(region.held_end, end)
    if not err:
        _take_in_growth(capture, region, mode)
    return err


cdef int register_region(capture_t *capture, region_t *region) noexcept nogil:
    cdef uint64_t mode = UFFDIO_REGISTER_MODE_WP
    cdef uint64_t length = region.track_end - region.track_start
    cdef int err
    if region.missing and capture.data == NULL:
        mode |= UFFDIO_REGISTER_MODE_MISSING
    elif capture.pid and capture.data == NULL:
        # A peer may have registered for missing faults itself. With WP_UNPOPULATED its holes get markers,
        # which no UFFDIO_ZEROPAGE fills (EEXIST): a fault on one could never be answered.
        uffd_unregister(capture.uffds[0], region.track_start, length)
    if capture.attached:
        err = register_attached(capture, region, mode)
    else:
        err = uffd_register(capture.uffds[0], region.track_start, length, mode)
    if err:
        capture_fail(capture, err, "UFFDIO_REGISTER", region.track_start)
    return err


cdef uint64_t _pieces(region_t *region) noexcept nogil:
    """A sparse file is one piece: its data is searched in order. So is memory of pages larger than one."""
    if region.sparse or region.unit_pages * PAGE > PIECE:
        return 1
    return (region.track_end + PIECE - 1) // PIECE - region.track_start // PIECE


cdef void _protect_piece(capture_t *capture, lane_t *lane, region_t *region, uint64_t number) noexcept nogil:
    # They meet at multiples of their size: a protect call that ends inside of a huge page splits it.
    cdef uint64_t addr = (region.track_start // PIECE + number) * PIECE
    cdef uint64_t start = max(addr, region.track_start)
    if region.sparse:
        _protect_sparse(capture, lane, region)
    elif _pieces(region) == 1:
        protect_range(capture, lane, region.track_start, region.track_end - region.track_start)
    else:
        protect_range(capture, lane, start, min(addr + PIECE, region.track_end) - start)


cdef void _protect_numbered(capture_t *capture, lane_t *lane, uint64_t piece) noexcept nogil:
    cdef int i = 0
    while piece >= _pieces(&capture.regions[i]):
        piece -= _pieces(&capture.regions[i])
        i += 1
    _protect_piece(capture, lane, &capture.regions[i], piece)


cdef int _register_all(capture_t *capture, uint64_t *pieces) noexcept nogil:
    cdef int i
    for i in range(capture.n_regions):
        if register_region(capture, &capture.regions[i]):
            return 1
        capture.n_registered = i + 1    # what is not ours by now is never unregistered by us
        pieces[0] += _pieces(&capture.regions[i])
    return 0


cdef uint64_t _await_caller(capture_t *capture) noexcept nogil:
    """Say that T can come, and wait until the caller wants it: nanoseconds waited."""
    cdef uint64_t begin = snap_now_ns()
    pthread_mutex_lock(&capture.lock)
    snap_store(&capture.ready, 1)
    pthread_cond_broadcast(&capture.changed)
    while not snap_load(&capture.go) and not snap_load(&capture.failed):
        pthread_cond_wait(&capture.changed, &capture.lock)
    pthread_mutex_unlock(&capture.lock)
    return snap_now_ns() - begin


cdef void _begin_noting(capture_t *capture) noexcept nogil:
    pthread_mutex_lock(&capture.lock)
    snap_store_seq(&capture.noting, 1)
    pthread_cond_broadcast(&capture.changed)
    pthread_mutex_unlock(&capture.lock)


cdef bint _noted(capture_t *capture, int err) noexcept nogil:
    if err:
        capture_fail(capture, err, "scan of the page tables", 0)
    return not snap_load(&capture.failed)


cdef void _fix_t(capture_t *capture, lane_t *lane, uint64_t pieces) noexcept nogil:
    """With two steps, after the caller has asked for it."""
    if not capture.two_step:
        all_pieces(capture, lane, _protect_numbered, pieces)
        return
    if capture.attached:
        note_again(capture)         # before: a writer that meets the second protection waits
    stop_noting(capture)
    if not snap_load(&capture.failed):
        share_edges(capture)
        all_pieces(capture, lane, protect_hits, hit_pieces(capture))


cdef int arm(capture_t *capture, lane_t *lane) noexcept nogil:
    cdef uint64_t pieces = 0
    cdef uint64_t waited = 0
    cdef uint64_t begin, pause, now
    if not capture.two_step:
        _await_caller(capture)
    begin = pause = snap_now_ns()
    if not _noted(capture, note_before(capture, lane)) or _register_all(capture, &pieces):
        return 1
    if capture.two_step:
        _begin_noting(capture)          # before the scan: a page that it does not see any more is a hit
    all_pieces(capture, lane, scan_before, spans(capture))
    if capture.two_step and not snap_load(&capture.failed):
        all_pieces(capture, lane, _protect_numbered, pieces)
        waited = _await_caller(capture)
        pause = snap_now_ns()
        hurry(capture)
    if not snap_load(&capture.failed):
        _fix_t(capture, lane, pieces)
    capture.t_ns = snap_now_ns()
    if snap_load(&capture.failed) or not _noted(capture, note_at_t(capture, lane)):
        return 1
    all_pieces(capture, lane, scan_at_t, spans(capture))
    now = snap_now_ns()
    capture.pause_ns = now - pause
    capture.arm_ns = now - begin - waited
    return snap_load(&capture.failed) != 0
