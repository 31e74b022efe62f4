"""The C API: the struct in the capsule ``snapengine._C_API``; snapengine.h documents it.

Runs on the embedder's threads. The functions that work on captures are thin: they take the GIL, call
`snapengine.snapshot`, and turn what it raises into an errno and a text of the calling thread.
"""

from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport ENOMEM
from libc.string cimport memcpy, memset

import errno

from snapengine.base.checksum cimport crc32c
from snapengine.base.pages cimport copy_page, page_nonzero

from snapengine.capture.capture import snapshot
from snapengine.errors import CaptureCancelled, ImageError, UnsupportedError
from snapengine.options import DIRTY_LOGGING, WRITE_TRACKING, Options
from snapengine.result import COMPLETED
from snapengine.targets.buffer import BufferTarget

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

cdef extern from * nogil:
    """
    static _Thread_local char snap_error_text[1024];
    """
    char snap_error_text[1024]

ctypedef int (*callback_t)(void *context) noexcept nogil

_METHODS = {SNAPENGINE_WRITE_TRACKING: WRITE_TRACKING, SNAPENGINE_DIRTY_LOGGING: DIRTY_LOGGING}


cdef class _Callback:
    """pause or resume: a C function, called without the GIL, which the writers it stops may need."""

    cdef callback_t function
    cdef void *context
    cdef str name

    def __call__(self):
        cdef int err
        with nogil:
            err = self.function(self.context)
        if err:
            raise OSError(err, f"{self.name}: the callback failed with errno {err}")


cdef object _callback(callback_t function, void *context, str name):
    cdef _Callback call
    if function == NULL:
        return None
    call = _Callback()
    call.function = function
    call.context = context
    call.name = name
    return call


cdef int _read_options(const snapengine_options *given, snapengine_options *options) except -1:
    """As the kernel reads its extensible structs (openat2(2)): shorter is padded with zeros, longer is
    accepted if the rest is zero."""
    cdef size_t known = sizeof(snapengine_options)
    cdef size_t size, i
    memset(options, 0, known)
    if given == NULL:
        return 0
    size = given.struct_size
    if size < sizeof(size_t):
        raise ValueError(f"options: struct_size {size} is too small")
    for i in range(known, size):
        if (<const char *>given)[i]:
            raise UnsupportedError(errno.E2BIG, "options: a field is set that this version does not know")
    memcpy(options, given, min(size, known))
    return 0


cdef object _start(void *addr, size_t length, int fd, const snapengine_options *given):
    cdef snapengine_options options
    _read_options(given, &options)
    if addr == NULL or not 0 < length <= <size_t>PY_SSIZE_T_MAX:
        raise ValueError(f"memory: {length} bytes at {<size_t>addr:#x}")
    if fd < 0:
        raise OSError(errno.EBADF, f"fd: {fd} is not a descriptor")
    if options.method not in _METHODS:
        raise ValueError(f"options: method {options.method} is unknown")
    chosen = {"method": _METHODS[options.method], "rate_limit": options.rate_limit,
              "fault_threads": options.fault_threads, "encoder_threads": options.encoder_threads}
    if options.zstd_level:
        chosen["compress"] = f"zstd:{options.zstd_level}"
    if options.memory_limit:
        chosen["memory_limit"] = options.memory_limit
    target = BufferTarget(
        {"memory": PyMemoryView_FromMemory(<char *>addr, length, PyBUF_WRITE)},
        pause=_callback(options.pause, options.context, "pause"),
        resume=_callback(options.resume, options.context, "resume"),
    )
    capture = snapshot(target, f"fd:{fd}", Options(**chosen))
    capture.start()
    return capture


cdef int _note(error) noexcept:
    """Keep the text of `error` for the calling thread; its errno, never 0 (that would be success)."""
    try:
        return _noted(error) or errno.EIO
    except BaseException:
        snap_error_text[0] = 0
        return ENOMEM


cdef int _noted(error) except -1:
    cdef bytes text = (str(error) or type(error).__name__).encode("utf-8", "replace")[:1023]
    memcpy(snap_error_text, <const char *>text, len(text) + 1)
    if isinstance(error, CaptureCancelled):
        return errno.ECANCELED
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, (TypeError, ValueError)) and not isinstance(error, ImageError):
        return errno.EINVAL
    return errno.EINTR if isinstance(error, KeyboardInterrupt) else errno.EIO


cdef int _fill(snapengine_result *out, result) except -1:
    cdef snapengine_result full
    cdef size_t size = out.struct_size
    if size < sizeof(size_t):
        raise ValueError(f"result: struct_size {size} is too small")
    full.struct_size = size
    full.image_bytes = result.image_bytes
    full.region_bytes = result.region_bytes
    full.nonzero_bytes = result.nonzero_bytes
    full.pages_total = result.pages_total
    full.pages_saved = result.pages_saved
    full.zero_pages = result.zero_pages
    full.hole_pages = result.hole_pages
    full.duplicate_pages = result.duplicate_pages
    full.lost_pages = result.lost_pages
    full.faults = result.faults
    full.rounds = result.rounds
    full.arm_ns = result.arm_ns
    full.stop_ns = result.stop_ns
    full.duration_ns = result.duration_ns
    full.fault_p50_ns = result.fault_ns["p50"]
    full.fault_p99_ns = result.fault_ns["p99"]
    full.fault_max_ns = result.fault_ns["max"]
    full.peak_buffer_bytes = result.peak_buffer_bytes
    full.spilled_bytes = result.spilled_bytes
    memcpy(out, &full, min(size, sizeof(full)))
    return 0


cdef int _wait(object capture, snapengine_result *out) except -1:
    capture.wait()
    result = capture.result
    if out != NULL:
        _fill(out, result)
    if result.status != COMPLETED:
        raise BlockingIOError(errno.EAGAIN, "dirty logging did not converge: there is no image")
    return 0


cdef snapengine_capture *snapshot_start(void *addr, size_t length, int fd,
                                        const snapengine_options *options) noexcept with gil:
    try:
        capture = _start(addr, length, fd, options)
    except BaseException as error:
        _note(error)
        return NULL
    Py_INCREF(capture)
    return <snapengine_capture *><PyObject *>capture


cdef int snapshot_wait(snapengine_capture *handle, snapengine_result *out) noexcept with gil:
    try:
        return _wait(<object><PyObject *>handle, out)
    except BaseException as error:
        return _note(error)


cdef void snapshot_cancel(snapengine_capture *handle) noexcept with gil:
    (<object><PyObject *>handle).cancel()


cdef void snapshot_free(snapengine_capture *handle) noexcept with gil:
    if handle == NULL:
        return
    capture = <object><PyObject *>handle
    Py_DECREF(capture)
    capture.cancel()
    while True:
        try:
            capture.wait()
            return
        except KeyboardInterrupt:   # the memory is the caller's to unmap once we return: not before
            pass


cdef size_t last_error(char *text, size_t size) noexcept nogil:
    cdef size_t length = 0
    while snap_error_text[length]:
        length += 1
    if size:
        memcpy(text, snap_error_text, min(length, size - 1))
        text[min(length, size - 1)] = 0
    return length


cdef int _copy_page(char *dst, const char *src) noexcept nogil:
    return copy_page(dst, src)


cdef int _page_nonzero(const char *src) noexcept nogil:
    return page_nonzero(src)


cdef uint32_t _crc32c(uint32_t crc, const void *data, size_t length) noexcept nogil:
    return crc32c(crc, data, length)


cdef snapengine_api _api
_api.abi_version = SNAPENGINE_ABI_VERSION
_api.struct_size = sizeof(snapengine_api)
_api.snapshot_start = snapshot_start
_api.snapshot_wait = snapshot_wait
_api.snapshot_cancel = snapshot_cancel
_api.snapshot_free = snapshot_free
_api.last_error = last_error
_api.copy_page = _copy_page
_api.page_nonzero = _page_nonzero
_api.crc32c = _crc32c

_C_API = PyCapsule_New(&_api, SNAPENGINE_CAPSULE, NULL)
