"""Loads and stores of this process's own memory that do not end it when the memory is not there.

The caller of a capture or a restore lends us a buffer. By mistake it may unmap it, cut its file short,
protect it, or free what lies under it; the thread that copies then faults. `guard_impl.h` says how the fault
becomes a result. A look before each copy would not do: between the look and the copy all may change.

The handlers of SIGSEGV and SIGBUS are process-wide: ours are in force while a capture of own memory runs or a
buffer is filled, and pass on every fault that is not of a guarded range.
"""

from libc.errno cimport EFAULT
from libc.string cimport memcpy, memset

from snapengine.base.checksum cimport crc32c

cdef extern from "base/nofault_impl.h" nogil:
    int snap_guarded_call(guarded_t fn, void *arg, uintptr_t low, uintptr_t high)
    void snap_guard_begin()
    void snap_guard_end()
    void snap_guard_thread()


cdef struct move_t:
    char *to
    const char *data
    size_t length
    uint32_t crc


cdef void guard_begin() noexcept nogil:
    snap_guard_begin()


cdef void guard_end() noexcept nogil:
    snap_guard_end()


cdef void guard_thread() noexcept nogil:
    snap_guard_thread()


cdef int guarded(guarded_t fn, void *arg, uintptr_t low, uintptr_t high) noexcept nogil:
    return snap_guarded_call(fn, arg, low, high)


cdef int _store(void *arg) noexcept nogil:
    cdef move_t *move = <move_t *>arg
    memcpy(move.to, move.data, move.length)
    return 0


cdef int _clear(void *arg) noexcept nogil:
    cdef move_t *move = <move_t *>arg
    memset(move.to, 0, move.length)
    return 0


cdef int _sum(void *arg) noexcept nogil:
    cdef move_t *move = <move_t *>arg
    move.crc = crc32c(move.crc, move.data, move.length)
    return 0


cdef int guarded_store(char *to, const char *data, size_t length) noexcept nogil:
    cdef move_t move
    move.to = to
    move.data = data
    move.length = length
    return EFAULT if snap_guarded_call(_store, &move, <uintptr_t>to, <uintptr_t>to + length) else 0


cdef int guarded_clear(char *to, size_t length) noexcept nogil:
    cdef move_t move
    move.to = to
    move.length = length
    return EFAULT if snap_guarded_call(_clear, &move, <uintptr_t>to, <uintptr_t>to + length) else 0


cdef int guarded_crc(uint32_t *crc, const char *data, size_t length) noexcept nogil:
    cdef move_t move
    move.data = data
    move.length = length
    move.crc = crc[0]
    if snap_guarded_call(_sum, &move, <uintptr_t>data, <uintptr_t>data + length):
        return EFAULT
    crc[0] = move.crc
    return 0
