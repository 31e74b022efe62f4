"""Work of arming in pieces, which all walkers take: protecting, protecting again, scanning the page tables.

The kernel takes its locks for reading there, and two threads are nearly twice as fast (protecting 1 GiB of 4
KiB pages: 22 ms by one, 14 ms by two). It is done when the last piece is, whoever did it.

`piece_work`, `pieces`, `pieces_taken` and `pieces_busy` are changed under `capture.lock`. A walker that stops
between taking a piece and giving it back keeps T from coming: nobody is served, everybody waits, and the
death of the process releases the target.
"""

from snapengine.atomics cimport snap_load
from snapengine.pthreads cimport (
    pthread_cond_broadcast, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock,
)


cdef bint _take(capture_t *capture, piece_work_t *work, uint64_t *piece) noexcept nogil:
    """With the lock held."""
    if capture.pieces_taken == capture.pieces or snap_load(&capture.failed):
        return False
    work[0] = <piece_work_t>capture.piece_work
    piece[0] = capture.pieces_taken
    capture.pieces_taken += 1
    capture.pieces_busy += 1
    return True


cdef void _work_off(capture_t *capture, lane_t *lane) noexcept nogil:
    """With the lock held, before and after."""
    cdef piece_work_t work = NULL
    cdef uint64_t piece = 0
    while _take(capture, &work, &piece):
        pthread_mutex_unlock(&capture.lock)
        work(capture, lane, piece)
        pthread_mutex_lock(&capture.lock)
        capture.pieces_busy -= 1
        if capture.pieces_busy == 0:
            pthread_cond_broadcast(&capture.changed)


cdef void all_pieces(capture_t *capture, lane_t *lane, piece_work_t work, uint64_t pieces) noexcept nogil:
    if pieces == 1:                 # the others would come too late
        work(capture, lane, 0)
        return
    pthread_mutex_lock(&capture.lock)
    capture.piece_work = <void *>work
    capture.pieces = pieces
    capture.pieces_taken = 0
    pthread_cond_broadcast(&capture.changed)
    _work_off(capture, lane)
    while capture.pieces_busy:
        pthread_cond_wait(&capture.changed, &capture.lock)
    pthread_mutex_unlock(&capture.lock)


cdef void help_pieces(capture_t *capture, lane_t *lane) noexcept nogil:
    pthread_mutex_lock(&capture.lock)
    while not snap_load(&capture.armed) and not snap_load(&capture.stopping):
        _work_off(capture, lane)
        if not snap_load(&capture.armed) and not snap_load(&capture.stopping) and (
                capture.pieces_taken == capture.pieces or snap_load(&capture.failed)):
            pthread_cond_wait(&capture.changed, &capture.lock)
    pthread_mutex_unlock(&capture.lock)


cdef uint64_t spans(capture_t *capture) noexcept nogil:
    return (capture.page_end + SPAN_PAGES - 1) // SPAN_PAGES


cdef int first_region(capture_t *capture, uint64_t page) noexcept nogil:
    """The first that ends behind `page`: they ascend by page number."""
    cdef int low = 0
    cdef int high = capture.n_regions
    cdef int middle
    while low < high:
        middle = (low + high) // 2
        if capture.regions[middle].first_page + capture.regions[middle].pages <= page:
            low = middle + 1
        else:
            high = middle
    return low


cdef bint span_of(region_t *region, uint64_t span, uint64_t *first, uint64_t *end) noexcept nogil:
    first[0] = max(region.first_page, span * SPAN_PAGES)
    end[0] = min(region.first_page + region.pages, (span + 1) * SPAN_PAGES)
    return first[0] < end[0]
