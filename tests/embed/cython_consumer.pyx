"""An embedder in Cython: calls the C level of the installed package without the GIL."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from snapengine.base.bitmap cimport Bitmap, bits_mask
from snapengine.capi cimport (
    snapengine_api, snapengine_capture, snapengine_import, snapengine_options, snapengine_result,
)
from snapengine.base.checksum cimport crc32c
from snapengine.base.pages cimport page_nonzero
from snapengine.kernel.uffd cimport Uffd, uffd_protect


def checksum(const unsigned char[::1] data not None):
    cdef uint32_t value
    with nogil:
        value = crc32c(0, &data[0], data.shape[0])
    return value


def claims():
    """Bits won by the first and by the second claim of overlapping pages."""
    cdef Bitmap bitmap = Bitmap(64)
    cdef uint64_t first, second
    with nogil:
        first = bitmap.claim_word(0, bits_mask(0, 8))
        second = bitmap.claim_word(0, bits_mask(4, 8))
    return first, second


def protect_nothing():
    """The errno of a protect of memory that is not registered."""
    cdef Uffd uffd = Uffd(1)    # PAGEFAULT_FLAG_WP
    cdef int err
    with nogil:
        err = uffd_protect(uffd.fd, 1 << 20, 4096)
    uffd.close()
    return err


def snapshot(int fd, size_t pages):
    """Save `pages` pages of new memory, each filled with its number; its writes after T stay out."""
    cdef const snapengine_api *api = snapengine_import()
    cdef snapengine_options options
    cdef snapengine_result result
    cdef snapengine_capture *capture
    cdef char *ram
    cdef size_t page
    cdef int err
    cdef char text[256]
    memset(&options, 0, sizeof(options))
    options.struct_size = sizeof(options)
    options.zstd_level = 3
    result.struct_size = sizeof(result)
    with nogil:
        ram = <char *>mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if ram == <char *>MAP_FAILED:
            with gil:
                raise MemoryError
        for page in range(pages):
            memset(ram + page * 4096, 1 + page % 200, 4096)
        capture = api.snapshot_start(ram, pages * 4096, fd, &options)
        err = -1
        if capture != NULL:
            memset(ram, 255, pages * 4096)
            err = api.snapshot_wait(capture, &result)
        if err:
            api.last_error(text, sizeof(text))
        api.snapshot_free(capture)
        munmap(ram, pages * 4096)
    if err:
        raise RuntimeError(text.decode())
    return result.pages_saved, result.image_bytes


def is_zero(const unsigned char[::1] page not None):
    return not page_nonzero(<const char *>&page[0])
