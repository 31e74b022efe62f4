# cython: cdivision=True, boundscheck=False, wraparound=False
"""Floor of a write fault that the faulting thread serves itself, in a SIGBUS handler.

Not shipped (setup_floors.py). With UFFD_FEATURE_SIGBUS no message is queued and no thread is woken, but the
target needs a signal handler. `sigbus_faults_ns` is not reentrant.
"""

from array import array

from libc.errno cimport errno
from libc.signal cimport SIG_DFL, SIGBUS
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy, memset
from posix.fcntl cimport O_CLOEXEC
from posix.signal cimport SA_SIGINFO, sigaction, sigaction_t, siginfo_t
from posix.unistd cimport close

from snapengine.kernel.linux cimport UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFDIO_REGISTER_MODE_WP, snap_uffd_open
from snapengine.base.oserror cimport raise_oserror
from snapengine.base.pthreads cimport snap_now_ns, snap_pin_to
from snapengine.kernel.uffd cimport uffd_api, uffd_protect, uffd_register, uffd_unprotect

cdef extern from "<linux/userfaultfd.h>":
    const uint64_t UFFD_FEATURE_SIGBUS

cdef extern from *:
    ctypedef char volatile_char "volatile char"

cdef uint64_t PAGE = 4096
cdef int sigbus_fd = -1
cdef char[4096] sigbus_copy


cdef void serve_in_place(int number, siginfo_t *info, void *context) noexcept nogil:
    cdef uint64_t at = <uint64_t><uintptr_t>info.si_addr & ~(PAGE - 1)
    cdef sigaction_t default
    memcpy(sigbus_copy, <const void *><uintptr_t>at, PAGE)
    if uffd_unprotect(sigbus_fd, at, PAGE):  # not our page: the repeated write ends the process
        memset(&default, 0, sizeof(default))
        default.sa_handler = SIG_DFL
        sigaction(SIGBUS, &default, NULL)


cdef int track(uint64_t addr, uint64_t length) noexcept nogil:
    """Open `sigbus_fd` and protect the memory with it. Returns an errno value."""
    global sigbus_fd
    cdef int err
    sigbus_fd = snap_uffd_open(O_CLOEXEC)
    if sigbus_fd < 0:
        return errno
    err = uffd_api(sigbus_fd, UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_SIGBUS)
    if not err:
        err = uffd_register(sigbus_fd, addr, length, UFFDIO_REGISTER_MODE_WP)
    if not err:
        err = uffd_protect(sigbus_fd, addr, length)
    if err:
        close(sigbus_fd)
    return err


cdef void write_all(uint64_t addr, uint64_t[::1] taken) noexcept nogil:
    cdef uint64_t began
    cdef Py_ssize_t i
    for i in range(taken.shape[0]):
        began = snap_now_ns()
        (<volatile_char *><uintptr_t>(addr + i * PAGE))[0] = 1
        taken[i] = snap_now_ns() - began


def sigbus_faults_ns(uint64_t addr, uint64_t length, int cpu=-1):
    """Protect the memory, then write to each page; returns an array of nanoseconds per write.

    `cpu`: first bind the calling thread to the cpu-th usable CPU. The old SIGBUS handler is restored.
    """
    cdef sigaction_t mine, before
    cdef int err
    cdef uint64_t[::1] taken
    result = array("Q", bytes(8 * (length // PAGE)))
    taken = result
    memset(&mine, 0, sizeof(mine))
    mine.sa_sigaction = serve_in_place
    mine.sa_flags = SA_SIGINFO
    with nogil:
        if cpu >= 0:
            snap_pin_to(cpu)
        err = track(addr, length)
        if not err:
            sigaction(SIGBUS, &mine, &before)
            write_all(addr, taken)
            sigaction(SIGBUS, &before, NULL)
            close(sigbus_fd)
    if err:
        raise_oserror(err, b"userfaultfd with UFFD_FEATURE_SIGBUS")
    return result
