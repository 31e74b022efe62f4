from libc.stdint cimport uint32_t, uintptr_t

# Memory of this process that its owner may unmap, cut or close to us at any time: a call that a fault ends
# instead of the program. Between guard_begin and guard_end, on threads that block neither SIGSEGV nor SIGBUS.

ctypedef int (*guarded_t)(void *arg) noexcept nogil

cdef void guard_begin() noexcept nogil
cdef void guard_end() noexcept nogil
# fn(arg), or -1 if a load or store in [low, high) faulted. What it had written stays. It must neither
# allocate, lock, nor make a guarded call. Do not nest.
cdef int guarded(guarded_t fn, void *arg, uintptr_t low, uintptr_t high) noexcept nogil
# 0, or EFAULT. Copy into memory of that kind; zero it; continue a CRC-32C with it.
cdef int guarded_store(char *to, const char *data, size_t length) noexcept nogil
cdef int guarded_clear(char *to, size_t length) noexcept nogil
cdef int guarded_crc(uint32_t *crc, const char *data, size_t length) noexcept nogil
# The calling thread may make guarded calls: unblock both signals.
cdef void guard_thread() noexcept nogil
