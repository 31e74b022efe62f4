# cython: language_level=3
"""A program in Cython that saves its memory without the GIL, and uses two of snapengine's small parts."""

from libc.stdint cimport uint32_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from snapengine.base.checksum cimport crc32c
from snapengine.base.pages cimport page_nonzero
from snapengine.capi cimport (
    snapengine_api, snapengine_capture, snapengine_import, snapengine_options, snapengine_result,
)

cdef enum:
    PAGE = 4096


cdef size_t populated(const char *ram, size_t pages) noexcept nogil:
    """How many pages are not all zero."""
    cdef size_t page, count = 0
    for page in range(pages):
        if page_nonzero(ram + page * PAGE):
            count += 1
    return count


def save_pages(int fd, size_t pages):
    """Fill every second page of new memory with ones, save it into `fd`, and overwrite it meanwhile.

    Returns (populated pages, pages that the image holds, CRC-32C of the memory at T).
    """
    cdef const snapengine_api *api = snapengine_import()
    cdef snapengine_options options
    cdef snapengine_result result
    cdef snapengine_capture *capture
    cdef char *ram
    cdef size_t page, found = 0
    cdef uint32_t checksum = 0
    cdef int err = -1
    cdef char text[256]
    memset(&options, 0, sizeof(options))
    options.struct_size = sizeof(options)
    result.struct_size = sizeof(result)
    text[0] = 0
    with nogil:
        ram = <char *>mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if ram == <char *>MAP_FAILED:
            with gil:
                raise MemoryError
        for page in range(0, pages, 2):
            memset(ram + page * PAGE, 1, PAGE)
        found = populated(ram, pages)
        checksum = crc32c(0, <const unsigned char *>ram, pages * PAGE)
        capture = api.snapshot_start(ram, pages * PAGE, fd, &options)
        if capture != NULL:
            memset(ram, 2, pages * PAGE)        # after T: not in the image
            err = api.snapshot_wait(capture, &result)
        if err:
            api.last_error(text, sizeof(text))
        api.snapshot_free(capture)
        munmap(ram, pages * PAGE)
    if err:
        raise RuntimeError(text.decode())
    return found, result.pages_saved, checksum
