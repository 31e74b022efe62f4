from libc.stdint cimport uint32_t, uintptr_t

# Guarded access to memory of this process that its owner may unmap, truncate or protect at any time: a fault
# ends the guarded call, not the process. Guarded calls are allowed between guard_begin and guard_end, on
# threads that block neither SIGSEGV nor SIGBUS.

ctypedef int (*guarded_t)(void *arg) noexcept nogil

cdef void guard_begin() noexcept nogil
cdef void guard_end() noexcept nogil
# Call fn(arg). Returns its result, or -1 if a load or store in [low, high) faulted; what fn wrote until then
# remains. fn must not allocate memory, take a lock, or make a guarded call.
cdef int guarded(guarded_t fn, void *arg, uintptr_t low, uintptr_t high) noexcept nogil
# Copy into such memory, zero it, continue a CRC-32C over it. Each returns 0 or EFAULT.
cdef int guarded_store(char *to, const char *data, size_t length) noexcept nogil
cdef int guarded_clear(char *to, size_t length) noexcept nogil
cdef int guarded_crc(uint32_t *crc, const char *data, size_t length) noexcept nogil
# Unblock both signals in the calling thread, so that it may make guarded calls.
cdef void guard_thread() noexcept nogil
