"""userfaultfd(2): one function per ioctl, and the class that owns a descriptor.

Any thread may call the ioctl functions; none of them allocates or needs the GIL. Features are negotiated
once, when the descriptor is made, and a kernel that lacks one is reported then. Sources: userfaultfd(2),
ioctl_userfaultfd(2), Documentation/admin-guide/mm/userfaultfd.rst.
"""

from libc.stdint cimport int64_t
from libc.errno cimport EACCES, EBUSY, ENOENT, ENOMEM, ENOSYS, EPERM, ESRCH, errno
from posix.fcntl cimport O_CLOEXEC, O_NONBLOCK
from posix.ioctl cimport ioctl
from posix.unistd cimport close

from snapengine.base.atomics cimport snap_load
from snapengine.kernel.linux cimport (
    IOCTL_UFFDIO_API, IOCTL_UFFDIO_CONTINUE, IOCTL_UFFDIO_COPY, IOCTL_UFFDIO_POISON, IOCTL_UFFDIO_REGISTER,
    IOCTL_UFFDIO_UNREGISTER, IOCTL_UFFDIO_WAKE, IOCTL_UFFDIO_WRITEPROTECT, IOCTL_UFFDIO_ZEROPAGE, UFFD_API,
    UFFDIO_REGISTER_MODE_MINOR, UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP,
    UFFDIO_WRITEPROTECT_MODE_WP,
    snap_uffd_open, uffdio_api, uffdio_continue, uffdio_copy, uffdio_poison, uffdio_range, uffdio_register,
    uffdio_writeprotect, uffdio_zeropage,
)
from snapengine.kernel.procmap_query cimport next_vma, vma_t
from snapengine.base.oserror cimport raise_oserror

import os

from snapengine.errors import UffdError, UffdPermissionError, UnsupportedError
from snapengine.kernel.features import UFFD_FEATURES, named

FEATURES = {row.name: 1 << row.bit for row in UFFD_FEATURES.values()}
"""Feature names (without UFFD_FEATURE_) and their bits."""

MODE_MISSING = UFFDIO_REGISTER_MODE_MISSING
MODE_WP = UFFDIO_REGISTER_MODE_WP
MODE_MINOR = UFFDIO_REGISTER_MODE_MINOR

PERMISSION_HELP = (
    "userfaultfd is not allowed for this user; one of these allows it: "
    "run as root or with CAP_SYS_PTRACE; give the user read and write access to /dev/userfaultfd; "
    "set the sysctl vm.unprivileged_userfaultfd to 1"
)


cdef int uffd_api(int fd, uint64_t features) noexcept nogil:
    cdef uffdio_api api
    api.api = UFFD_API
    api.features = features
    api.ioctls = 0
    return 0 if ioctl(fd, IOCTL_UFFDIO_API, &api) == 0 else errno


cdef int uffd_register(int fd, uint64_t start, uint64_t length, uint64_t mode) noexcept nogil:
    cdef uffdio_register arg
    arg.range.start = start
    arg.range.len = length
    arg.mode = mode
    arg.ioctls = 0
    return 0 if ioctl(fd, IOCTL_UFFDIO_REGISTER, &arg) == 0 else errno


cdef int uffd_unregister(int fd, uint64_t start, uint64_t length) noexcept nogil:
    cdef uffdio_range arg
    arg.start = start
    arg.len = length
    return 0 if ioctl(fd, IOCTL_UFFDIO_UNREGISTER, &arg) == 0 else errno


cdef int _writeprotect(int fd, uint64_t start, uint64_t length, uint64_t mode) noexcept nogil:
    cdef uffdio_writeprotect arg
    arg.range.start = start
    arg.range.len = length
    arg.mode = mode
    return 0 if ioctl(fd, IOCTL_UFFDIO_WRITEPROTECT, &arg) == 0 else errno


cdef int uffd_protect(int fd, uint64_t start, uint64_t length) noexcept nogil:
    return _writeprotect(fd, start, length, UFFDIO_WRITEPROTECT_MODE_WP)


cdef int _register_halves(int fd, const uint64_t *stop, uint64_t start, uint64_t length, uint64_t unit,
                          uint64_t mode) noexcept nogil:
    cdef uint64_t half
    cdef int err = uffd_register(fd, start, length, mode)
    if not err or err == EBUSY or err == ESRCH:
        return err
    if length <= unit and err == ENOMEM and uffd_unregister(fd, start, length) == ENOMEM:
        return ESRCH                    # the process has ended; nothing was registered here, or split
    if length <= unit or snap_load(stop):
        return 0
    half = half_of(length, unit)
    err = _register_halves(fd, stop, start, half, unit, mode)
    return err if err else _register_halves(fd, stop, start + half, length - half, unit, mode)


cdef bint _changed(int maps, const vma_t *vma, uint64_t at) noexcept nogil:
    """Whether the mapping at `at` is no longer the one that `vma` describes."""
    cdef vma_t now
    return next_vma(maps, at, &now) != 0 or now.start != vma.start or now.end != vma.end \
        or now.flags != vma.flags or now.device != vma.device or now.inode != vma.inode


cdef int register_mapped(int fd, int maps, const uint64_t *stop, uint64_t start, uint64_t length,
                         uint64_t unit, uint64_t mode) noexcept nogil:
    cdef uint64_t end = start + length
    cdef uint64_t first
    cdef vma_t vma
    cdef int err = uffd_register(fd, start, length, mode)
    if not err or err == EBUSY or err == ESRCH:
        return err
    while start < end and not snap_load(stop):
        err = next_vma(maps, start, &vma)
        if err == ESRCH:
            return err
        if err and err != ENOENT:
            return _register_halves(fd, stop, start, end - start, unit, mode)
        if err or vma.start >= end:
            return 0
        first = max(vma.start, start)
        err = uffd_register(fd, first, min(vma.end, end) - first, mode)
        if err == EBUSY or err == ESRCH:
            return err
        if not err or not _changed(maps, &vma, first):
            start = vma.end
    return 0


cdef int _protect_halves(int fd, const uint64_t *stop, uint64_t start, uint64_t length) noexcept nogil:
    cdef uint64_t half
    cdef int err = uffd_protect(fd, start, length)
    if err != ENOENT:
        return err
    if length <= 4096 or snap_load(stop):
        return 0
    half = half_of(length, 4096)
    err = _protect_halves(fd, stop, start, half)
    return err if err else _protect_halves(fd, stop, start + half, length - half)


cdef int protect_mapped(int fd, int maps, const uint64_t *stop, uint64_t start,
                        uint64_t length) noexcept nogil:
    cdef uint64_t end = start + length
    cdef uint64_t first
    cdef vma_t vma
    cdef int err = uffd_protect(fd, start, length)
    if err != ENOENT:
        return err
    while start < end and not snap_load(stop):
        err = next_vma(maps, start, &vma)
        if err and err != ENOENT:
            return _protect_halves(fd, stop, start, end - start)
        if err or vma.start >= end:
            return 0
        first = max(vma.start, start)
        err = uffd_protect(fd, first, min(vma.end, end) - first)
        if err and err != ENOENT:
            return err
        if not err or not _changed(maps, &vma, first):
            start = vma.end
    return 0


cdef int uffd_unprotect(int fd, uint64_t start, uint64_t length) noexcept nogil:
    return _writeprotect(fd, start, length, 0)


cdef int _filled(int status, int64_t result, uint64_t *done) noexcept nogil:
    """0 or errno of an ioctl that fills pages. `result` is what it wrote: bytes, or the negative errno."""
    cdef int err = 0 if status == 0 else errno
    if done != NULL:
        done[0] = <uint64_t>max(result, <int64_t>0)
    return err


# The kernel does not read the last field of these structs, and some errors leave it unwritten: it begins
# with 0.


cdef int uffd_copy(int fd, uint64_t start, const void *source, uint64_t length, uint64_t mode,
                   uint64_t *done) noexcept nogil:
    cdef uffdio_copy arg
    arg.dst = start
    arg.src = <uint64_t>source
    arg.len = length
    arg.mode = mode
    arg.copy = 0
    cdef int status = ioctl(fd, IOCTL_UFFDIO_COPY, &arg)
    return _filled(status, arg.copy, done)


cdef int uffd_zeropage(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil:
    cdef uffdio_zeropage arg
    arg.range.start = start
    arg.range.len = length
    arg.mode = mode
    arg.zeropage = 0
    cdef int status = ioctl(fd, IOCTL_UFFDIO_ZEROPAGE, &arg)
    return _filled(status, arg.zeropage, done)


cdef int uffd_continue(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil:
    cdef uffdio_continue arg
    arg.range.start = start
    arg.range.len = length
    arg.mode = mode
    arg.mapped = 0
    cdef int status = ioctl(fd, IOCTL_UFFDIO_CONTINUE, &arg)
    return _filled(status, arg.mapped, done)


cdef int uffd_poison(int fd, uint64_t start, uint64_t length, uint64_t mode, uint64_t *done) noexcept nogil:
    cdef uffdio_poison arg
    arg.range.start = start
    arg.range.len = length
    arg.mode = mode
    arg.updated = 0
    cdef int status = ioctl(fd, IOCTL_UFFDIO_POISON, &arg)
    return _filled(status, arg.updated, done)


cdef int uffd_wake(int fd, uint64_t start, uint64_t length) noexcept nogil:
    cdef uffdio_range arg
    arg.start = start
    arg.len = length
    return 0 if ioctl(fd, IOCTL_UFFDIO_WAKE, &arg) == 0 else errno


cdef int _open() except -1:
    cdef int fd
    cdef int err
    with nogil:
        fd = snap_uffd_open(O_CLOEXEC | O_NONBLOCK)
        err = errno
    if fd >= 0:
        return fd
    if err in (EPERM, EACCES):
        raise UffdPermissionError(err, PERMISSION_HELP)
    if err == ENOSYS:
        raise UnsupportedError(err, "this kernel is built without userfaultfd (CONFIG_USERFAULTFD)")
    raise UffdError(err, f"userfaultfd: {os.strerror(err)}")


cdef int _check(int err, const char *call) except -1:
    if err:
        raise_oserror(err, call)
    return 0


cdef object _bytes_done(int err, uint64_t done, const char *call):
    if err and not done:
        raise_oserror(err, call)
    return done


def feature_names(uint64_t features):
    """The names of the feature bits set in `features`, for messages."""
    return [name for name, bit in FEATURES.items() if features & bit]


def supported_features():
    """The feature bits that this kernel offers.

    Raises UffdPermissionError, UnsupportedError or UffdError.
    """
    cdef int fd = _open()
    cdef uffdio_api api
    cdef int err
    api.api = UFFD_API
    api.features = 0
    api.ioctls = 0
    with nogil:
        err = 0 if ioctl(fd, IOCTL_UFFDIO_API, &api) == 0 else errno
        close(fd)
    if err:
        raise UffdError(err, "UFFDIO_API: the kernel refuses the interface")
    return api.features


def negotiated_features(int fd):
    """The features that a userfaultfd descriptor was negotiated with, or None before UFFDIO_API.

    The kernel shows them in /proc/self/fdinfo ("API: aa:FEATURES:IOCTLS"). Bit 31 means that UFFDIO_API was
    called. Raises OSError if `fd` is not a userfaultfd.
    """
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("API:"):
                features = int(line.split()[1].split(":")[1], 16)
                return features & 0x7FFFFFFF if features >> 31 & 1 else None
    raise OSError(22, f"descriptor {fd} is not a userfaultfd")


cdef class Uffd:
    """A userfaultfd of this process, or one that another process handed over.

    Parameters
    ----------
    features:
        UFFD_FEATURE bits to negotiate.
    fd:
        A descriptor to take over instead of opening one. It is negotiated with `features`, unless its
        previous owner has done that. This object owns it from the call on, and closes it if the call raises.

    Raises
    ------
    UffdPermissionError
        userfaultfd is not allowed; the text names the three ways to allow it.
    UnsupportedError
        The kernel, or the owner of `fd`, lacks a feature; the text names it.
    """

    def __cinit__(self, uint64_t features=0, int fd=-1):
        self.fd = -1
        self.made = True
        self.features = features

    def __init__(self, uint64_t features=0, int fd=-1):
        if self.fd >= 0:
            raise ValueError("already open")
        self.fd = _open() if fd < 0 else fd
        try:
            negotiated = None
            if fd >= 0:
                negotiated = negotiated_features(fd)
                os.set_blocking(fd, False)
            if negotiated is None:
                self._negotiate(features)
            elif features & ~<uint64_t>negotiated:
                self._refuse(features & ~<uint64_t>negotiated)
            else:
                self.features = negotiated
        except BaseException:
            self.close()            # at once: a traceback may keep the object alive
            raise

    def _negotiate(self, uint64_t features):
        cdef int err = uffd_api(self.fd, features)
        if not err:
            return
        missing = features & ~<uint64_t>supported_features()
        if missing:
            self._refuse(missing)
        raise UffdError(err, f"UFFDIO_API: {os.strerror(err)}")

    def _refuse(self, uint64_t missing):
        names = ", ".join(map(named, feature_names(missing))) or hex(missing)
        # The kernel's own limits come first: a descriptor that was handed over cannot offer more.
        kernel = missing & ~<uint64_t>supported_features()
        who = "this kernel" if kernel else "the handed-over userfaultfd"
        raise UnsupportedError(95, f"{who} lacks {names}")

    def register(self, uint64_t start, uint64_t length, uint64_t mode=UFFDIO_REGISTER_MODE_WP):
        """UFFDIO_REGISTER of `length` bytes at `start`. Raises OSError."""
        _check(uffd_register(self.fd, start, length, mode), b"UFFDIO_REGISTER")

    def unregister(self, uint64_t start, uint64_t length):
        """UFFDIO_UNREGISTER: clears the protection and wakes the waiters. Raises OSError."""
        _check(uffd_unregister(self.fd, start, length), b"UFFDIO_UNREGISTER")

    def protect(self, uint64_t start, uint64_t length):
        """UFFDIO_WRITEPROTECT with MODE_WP. Raises OSError."""
        _check(uffd_protect(self.fd, start, length), b"UFFDIO_WRITEPROTECT")

    def unprotect(self, uint64_t start, uint64_t length):
        """UFFDIO_WRITEPROTECT without MODE_WP; wakes the waiters. Raises OSError."""
        _check(uffd_unprotect(self.fd, start, length), b"UFFDIO_WRITEPROTECT")

    # These four return the bytes that were filled: fewer than asked for if a later page failed. They raise
    # OSError if the first page did. Without the GIL: reading `data` may itself fault.

    def copy(self, uint64_t start, const unsigned char[::1] data not None, uint64_t mode=0):
        """UFFDIO_COPY: fills missing pages with `data`, and wakes the waiters."""
        cdef uint64_t length = data.shape[0]
        cdef const void *source = &data[0] if length else NULL
        cdef uint64_t done
        cdef int err
        with nogil:
            err = uffd_copy(self.fd, start, source, length, mode, &done)
        return _bytes_done(err, done, b"UFFDIO_COPY")

    def zeropage(self, uint64_t start, uint64_t length, uint64_t mode=0):
        """UFFDIO_ZEROPAGE: fills missing pages with zeros, and wakes the waiters."""
        cdef uint64_t done
        cdef int err
        with nogil:
            err = uffd_zeropage(self.fd, start, length, mode, &done)
        return _bytes_done(err, done, b"UFFDIO_ZEROPAGE")

    def map_existing(self, uint64_t start, uint64_t length, uint64_t mode=0):
        """UFFDIO_CONTINUE: maps the pages that the memory file has, and wakes the waiters."""
        cdef uint64_t done
        cdef int err
        with nogil:
            err = uffd_continue(self.fd, start, length, mode, &done)
        return _bytes_done(err, done, b"UFFDIO_CONTINUE")

    def poison(self, uint64_t start, uint64_t length, uint64_t mode=0):
        """UFFDIO_POISON: a later access to these missing pages raises SIGBUS; so it does in the waiters."""
        cdef uint64_t done
        cdef int err
        with nogil:
            err = uffd_poison(self.fd, start, length, mode, &done)
        return _bytes_done(err, done, b"UFFDIO_POISON")

    def wake(self, uint64_t start, uint64_t length):
        """UFFDIO_WAKE. Raises OSError."""
        _check(uffd_wake(self.fd, start, length), b"UFFDIO_WAKE")

    def detach(self):
        """Hand the descriptor to the caller, who must close it."""
        cdef int fd = self.fd
        self.fd = -1
        return fd

    def close(self):
        """Close the descriptor: the kernel removes the protection and wakes the waiters. Idempotent."""
        cdef int fd = self.fd
        self.fd = -1
        if fd >= 0:
            with nogil:
                close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __dealloc__(self):
        if self.made and self.fd >= 0:
            close(self.fd)
