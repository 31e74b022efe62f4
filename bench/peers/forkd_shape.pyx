# cython: cdivision=True
"""A loop with the structure of forkd's live snapshots: one handler thread, one mutex for the bulk pass.

The bulk pass holds the mutex from the first page to the last and writes one page per call. It un-protects
nothing; all memory is un-protected after it. The handler un-protects a saved page at once, and takes the
mutex for one that is not saved: then it, and with it every later fault, waits for the end of the pass. A page
is marked as saved after it was written, so the image is consistent. Own code for comparison; not shipped
(setup_floors.py).
"""

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close, pipe

from pagewise cimport PAGE, copy_page, next_fault, write_page
from snapengine.base.atomics cimport snap_load, snap_store
from snapengine.base.oserror cimport raise_oserror
from snapengine.base.pthreads cimport (
    pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock, pthread_t, snap_thread_start,
)
from snapengine.kernel.uffd cimport uffd_unprotect, uffd_unregister

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long count, int timeout)
    const short POLLIN

cdef struct Branch:
    int uffd
    int sink
    uint64_t addr
    uint64_t pages
    uint64_t *saved             # one word per page
    pthread_mutex_t mutex
    int[2] stop                 # a pipe; its end is the sign
    uint64_t faults
    int err                     # of the handler
    char[4096] copy             # of the last page, under the mutex


cdef int save_page(Branch *b, uint64_t page) noexcept nogil:
    """With the mutex held."""
    cdef int err
    if snap_load(&b.saved[page]):
        return 0
    # It is still protected, so write(2) is the copy; without a sink there must be another.
    if b.sink < 0:
        copy_page(b.copy, b.addr, page)
    err = write_page(b.sink, <const char *>(b.addr + page * PAGE), page)
    snap_store(&b.saved[page], not err)
    return err


cdef int serve(Branch *b, uint64_t page) noexcept nogil:
    cdef int err = 0
    b.faults += 1
    if not snap_load(&b.saved[page]):
        pthread_mutex_lock(&b.mutex)
        err = save_page(b, page)
        pthread_mutex_unlock(&b.mutex)
    return err or uffd_unprotect(b.uffd, b.addr + page * PAGE, PAGE)


cdef void *handler_main(void *argument) noexcept nogil:
    cdef Branch *b = <Branch *>argument
    cdef pollfd[2] fds
    cdef int64_t page
    fds[0].fd, fds[1].fd = b.uffd, b.stop[0]
    fds[0].events = fds[1].events = POLLIN
    while not b.err:
        fds[0].revents = fds[1].revents = 0
        poll(fds, 2, -1)
        if fds[1].revents:
            break
        page = next_fault(b.uffd, b.addr)
        if page >= 0:
            b.err = serve(b, page)
    return NULL


cdef int bulk_pass(Branch *b) noexcept nogil:
    cdef uint64_t page
    cdef int err
    for page in range(b.pages):
        err = save_page(b, page)
        if err:
            return err
    return 0


cdef int save_all(Branch *b) noexcept nogil:
    cdef pthread_t handler
    cdef int err, bulk_err
    if pipe(b.stop):
        return errno
    pthread_mutex_lock(&b.mutex)
    err = snap_thread_start(&handler, handler_main, b)
    if err:
        pthread_mutex_unlock(&b.mutex)
    else:
        bulk_err = bulk_pass(b)
        pthread_mutex_unlock(&b.mutex)
        close(b.stop[1])
        b.stop[1] = -1
        pthread_join(handler, NULL)
        err = bulk_err or b.err or uffd_unregister(b.uffd, b.addr, b.pages * PAGE)
    close(b.stop[0])
    if b.stop[1] >= 0:
        close(b.stop[1])
    return err


def save(int uffd, int sink, uint64_t addr, uint64_t length):
    """Write the protected memory into `sink`, each page at its offset; returns the number of served faults.

    `sink`: a descriptor; negative: pages are only copied. `uffd`: non-blocking, with the memory registered
    and protected. Raises OSError; then closing `uffd` un-protects the rest.
    """
    cdef Branch b
    cdef int err
    b.uffd, b.sink, b.addr, b.pages, b.faults, b.err = uffd, sink, addr, length // PAGE, 0, 0
    b.saved = <uint64_t *>calloc(b.pages, sizeof(uint64_t))
    if b.saved == NULL:
        raise MemoryError
    pthread_mutex_init(&b.mutex, NULL)
    with nogil:
        err = save_all(&b)
    pthread_mutex_destroy(&b.mutex)
    free(b.saved)
    if err:
        raise_oserror(err, b"forkd-shape")
    return b.faults
