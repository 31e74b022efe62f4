# cython: cdivision=True, boundscheck=False, wraparound=False
"""Floors of copying, reading and zero-testing memory, in as little code as possible.

Not shipped: setup_floors.py builds it into build/bench/. Buffers must be populated. All results are
nanoseconds of CLOCK_MONOTONIC.
"""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.types cimport pid_t

from snapengine.base.atomics cimport snap_add, snap_load, snap_pause
from snapengine.base.oserror cimport raise_oserror
from snapengine.kernel.processvm cimport iovec, process_vm_readv
from snapengine.base.pthreads cimport pthread_join, pthread_t, snap_now_ns, snap_thread_start

cdef extern from * nogil:
    """
    /* Reads the whole page, as testing a zero page does. */
    __attribute__((target_clones("avx2", "default"), optimize("O3")))
    static int floor_nonzero(const unsigned long *words) {
        unsigned long seen = 0;
        for (int i = 0; i < 512; i++)
            seen |= words[i];
        return seen != 0;
    }
    """
    int floor_nonzero(const unsigned long *words)

cdef enum:
    PAGE = 4096
    MAX_THREADS = 16

cdef struct Part:
    char *dst
    const char *src
    size_t length
    uint64_t *ready             # threads that are ready to start
    uint64_t threads
    uint64_t began
    uint64_t ended
    pthread_t thread


def address_of(const unsigned char[::1] data not None):
    """The address of a buffer."""
    return <uintptr_t>&data[0]


def fill(unsigned char[::1] data not None, int value=0x5A):
    """Write every byte."""
    cdef uint64_t length = data.shape[0]
    with nogil:
        memset(&data[0], value, length)


def copy_ns(unsigned char[::1] dst not None, const unsigned char[::1] src not None):
    """One memcpy() of the whole buffer."""
    cdef uint64_t length = src.shape[0]
    cdef uint64_t began
    if dst.shape[0] < src.shape[0]:
        raise ValueError("dst is smaller than src")
    with nogil:
        began = snap_now_ns()
        memcpy(&dst[0], &src[0], length)
        began = snap_now_ns() - began
    return began


cdef void *copy_part(void *argument) noexcept nogil:
    cdef Part *part = <Part *>argument
    snap_add(part.ready, 1)
    while snap_load(part.ready) < part.threads:
        snap_pause()
    part.began = snap_now_ns()
    memcpy(part.dst, part.src, part.length)
    part.ended = snap_now_ns()
    return NULL


cdef int start_parts(Part *parts, int threads, char *dst, const char *src, size_t length) noexcept nogil:
    """Start threads that wait for each other before they copy. Returns an errno value."""
    cdef size_t each = length // threads
    cdef int i, err = 0
    for i in range(threads):
        parts[i].dst = dst + i * each
        parts[i].src = src + i * each
        parts[i].length = each if i < threads - 1 else length - i * each
        parts[i].ready = parts[0].ready
        parts[i].threads = threads
        err = snap_thread_start(&parts[i].thread, copy_part, &parts[i])
        if err:
            parts[0].ready[0] = threads  # do not let started threads wait
            break
    parts[0].threads = i if err else threads
    return err


def copy_by_threads_ns(unsigned char[::1] dst not None, const unsigned char[::1] src not None, int threads):
    """memcpy() of the buffer by `threads` in parallel, from the first start to the last end."""
    cdef Part[MAX_THREADS] parts
    cdef uint64_t ready = 0, began, ended
    cdef int err, i
    if dst.shape[0] < src.shape[0] or not 1 <= threads <= MAX_THREADS:
        raise ValueError("dst is smaller than src, or threads is not in 1 ... 16")
    parts[0].ready = &ready
    with nogil:
        err = start_parts(parts, threads, <char *>&dst[0], <const char *>&src[0], src.shape[0])
        for i in range(<int>parts[0].threads):
            pthread_join(parts[i].thread, NULL)
    if err:
        raise_oserror(err, b"pthread_create")
    began, ended = parts[0].began, parts[0].ended
    for i in range(1, threads):
        began, ended = min(began, parts[i].began), max(ended, parts[i].ended)
    return ended - began


def zero_test_ns(const unsigned char[::1] data not None):
    """Test each page for zeros: (nanoseconds, pages that are not zero)."""
    cdef uint64_t pages = data.shape[0] // PAGE, page, began, found = 0
    with nogil:
        began = snap_now_ns()
        for page in range(pages):
            found += floor_nonzero(<const unsigned long *>&data[page * PAGE])
        began = snap_now_ns() - began
    return began, found


def vm_read_ns(pid_t pid, uint64_t addr, uint64_t length, unsigned char[::1] dst not None):
    """process_vm_readv() of `length` bytes of another process, with calls of the size of `dst`."""
    cdef iovec local, remote
    cdef uint64_t at = 0, began
    cdef ssize_t got = 0
    local.iov_base = &dst[0]
    with nogil:
        began = snap_now_ns()
        while at < length:
            local.iov_len = min(<uint64_t>dst.shape[0], length - at)
            remote.iov_base = <void *><uintptr_t>(addr + at)
            remote.iov_len = local.iov_len
            got = process_vm_readv(pid, &local, 1, &remote, 1, 0)
            if got <= 0:
                break
            at += got
        began = snap_now_ns() - began
    if got <= 0:
        raise_oserror(errno, b"process_vm_readv")
    return began
