"""Loads and stores of memory of this process that return an error if the memory is gone.

The caller of a capture or a restore supplies a buffer. By mistake it may unmap the buffer, truncate its file,
protect it, or free the underlying memory. The thread that copies then faults; `nofault_impl.h` turns the
fault into a result. A check before each copy would not suffice: the memory can change between check and copy.

Handlers of SIGSEGV and SIGBUS are process-wide. Ours are installed while a capture of own memory runs or a
buffer is filled. They forward every fault outside a guarded range.
"""

from libc.errno cimport EFAULT
from libc.string cimport memcpy, memset

from snapengine.base.checksum cimport crc32c

cdef extern from "base/nofault_impl.h" nogil:
    int snap_guarded_call(guarded_t fn, void *arg, uintptr_t low, uintptr_t high)
    void snap_guard_begin()
    void snap_guard_end()
    void snap_guard_thread()


cdef struct copy_t:
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
    cdef copy_t *copy = <copy_t *>arg
    memcpy(copy.to, copy.data, copy.length)
    return 0


cdef int _clear(void *arg) noexcept nogil:
    cdef copy_t *copy = <copy_t *>arg
    memset(copy.to, 0, copy.length)
    return 0


cdef int _crc(void *arg) noexcept nogil:
    cdef copy_t *copy = <copy_t *>arg
    copy.crc = crc32c(copy.crc, copy.data, copy.length)
    return 0


cdef int guarded_store(char *to, const char *data, size_t length) noexcept nogil:
    cdef copy_t copy
    copy.to = to
    copy.data = data
    copy.length = length
    return EFAULT if snap_guarded_call(_store, &copy, <uintptr_t>to, <uintptr_t>to + length) else 0


cdef int guarded_clear(char *to, size_t length) noexcept nogil:
    cdef copy_t copy
    copy.to = to
    copy.length = length
    return EFAULT if snap_guarded_call(_clear, &copy, <uintptr_t>to, <uintptr_t>to + length) else 0


cdef int guarded_crc(uint32_t *crc, const char *data, size_t length) noexcept nogil:
    cdef copy_t copy
    copy.data = data
    copy.length = length
    copy.crc = crc[0]
    if snap_guarded_call(_crc, &copy, <uintptr_t>data, <uintptr_t>data + length):
        return EFAULT
    crc[0] = copy.crc
    return 0
