"""Page copy fused with the test for zero pages: a scalar reference, and AVX2. With AVX-512 and VPCLMULQDQ the
checksum is computed in the same pass, while the copy waits for memory.

Capture threads call it once per page. The caller must ensure that no other thread writes to the source during
the copy (the page is protected).
"""

from snapengine.base.checksum cimport crc32c

cdef extern from "base/crc_impl.h" nogil:
    int snap_have_folding()
    int snap_copy_page_folding(char *dst, const char *src, uint32_t *crc)

cdef extern from "base/pages_impl.h" nogil:
    ctypedef int (*snap_copy_page_t)(char *dst, const char *src) noexcept nogil
    ctypedef int (*snap_page_nonzero_t)(const char *src) noexcept nogil
    int snap_copy_page_scalar(char *dst, const char *src)
    int snap_copy_page_avx2(char *dst, const char *src)
    int snap_page_nonzero_scalar(const char *src)
    int snap_page_nonzero_avx2(const char *src)
    int snap_have_avx2()

cdef snap_copy_page_t _copy = snap_copy_page_scalar
cdef snap_page_nonzero_t _nonzero = snap_page_nonzero_scalar
if snap_have_avx2():
    _copy = snap_copy_page_avx2
    _nonzero = snap_page_nonzero_avx2

KERNEL = "avx2" if _copy == snap_copy_page_avx2 else "scalar"
"""The implementation in use: ``"avx2"`` or ``"scalar"``."""

KERNELS = ("scalar", "avx2") if snap_have_avx2() else ("scalar",)
"""The implementations that this CPU supports."""


cdef int copy_page(char *dst, const char *src) noexcept nogil:
    return _copy(dst, src)


cdef int page_nonzero(const char *src) noexcept nogil:
    return _nonzero(src)


cdef bint _folding = snap_have_folding()

SUM_KERNELS = ("apart", "folding") if _folding else ("apart",)
"""The implementations of copy and checksum on this CPU: two passes or one. The last one is used."""


cdef int copy_page_sum(char *dst, const char *src, uint32_t *crc) noexcept nogil:
    if _folding:
        return snap_copy_page_folding(dst, src, crc)
    if not _copy(dst, src):
        return 0
    crc[0] = crc32c(crc[0], dst, 4096)
    return 1


def copy_with(str kernel, unsigned char[::1] dst not None, const unsigned char[::1] src not None):
    """Copy one page by the implementation `kernel`; return whether it is non-zero. For tests and benchmarks.

    Raises ValueError unless both buffers have 4096 bytes and this CPU supports the implementation.
    """
    if dst.shape[0] != 4096 or src.shape[0] != 4096:
        raise ValueError("both buffers must have 4096 bytes")
    if kernel not in KERNELS:
        raise ValueError(f"kernel: {kernel!r} is none of {', '.join(KERNELS)}")
    if kernel == "avx2":
        return bool(snap_copy_page_avx2(<char *>&dst[0], <const char *>&src[0]))
    return bool(snap_copy_page_scalar(<char *>&dst[0], <const char *>&src[0]))


def nonzero_with(str kernel, const unsigned char[::1] src not None):
    """Whether a page of 4096 bytes is non-zero, by the implementation `kernel`. ValueError as above."""
    if src.shape[0] != 4096:
        raise ValueError("the buffer must have 4096 bytes")
    if kernel not in KERNELS:
        raise ValueError(f"kernel: {kernel!r} is none of {', '.join(KERNELS)}")
    if kernel == "avx2":
        return bool(snap_page_nonzero_avx2(<const char *>&src[0]))
    return bool(snap_page_nonzero_scalar(<const char *>&src[0]))


def copy_sum_with(str kernel, unsigned char[::1] dst not None, const unsigned char[::1] src not None,
                  uint32_t crc=0):
    """Copy one page; return the CRC-32C continued over it, or None if it is all zero. ValueError as above."""
    if dst.shape[0] != 4096 or src.shape[0] != 4096:
        raise ValueError("both buffers must have 4096 bytes")
    if kernel not in SUM_KERNELS:
        raise ValueError(f"kernel: {kernel!r} is none of {', '.join(SUM_KERNELS)}")
    if kernel == "folding":
        return crc if snap_copy_page_folding(<char *>&dst[0], <const char *>&src[0], &crc) else None
    return crc32c(crc, &dst[0], 4096) if _copy(<char *>&dst[0], <const char *>&src[0]) else None
