# extern-only: no matching .pyx. process_vm_readv(2).
from posix.types cimport pid_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(pid_t pid, const iovec *local, unsigned long n_local,
                             const iovec *remote, unsigned long n_remote, unsigned long flags)
