# Shared by the loops that save memory page by page, with one write(2) and one ioctl for each page.
from libc.errno cimport EIO, errno
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.string cimport memcpy
from posix.unistd cimport pwrite, read

from snapengine.kernel.linux cimport UFFD_EVENT_PAGEFAULT, uffd_msg

cdef enum:
    PAGE = 4096


# Write a page to its offset in the raw image (not if `sink` is negative). Returns an errno value, or 0.
cdef inline int write_page(int sink, const char *data, uint64_t page) noexcept nogil:
    cdef ssize_t done
    if sink < 0:
        return 0
    done = pwrite(sink, data, PAGE, page * PAGE)
    if done == PAGE:
        return 0
    return errno if done < 0 else EIO


# The page of the next fault, or -1 if there is none.
cdef inline int64_t next_fault(int uffd, uint64_t addr) noexcept nogil:
    cdef uffd_msg message
    if read(uffd, &message, sizeof(message)) != sizeof(message) or message.event != UFFD_EVENT_PAGEFAULT:
        return -1
    return <int64_t>((message.arg.pagefault.address - addr) // PAGE)


cdef inline void copy_page(char *copy, uint64_t addr, uint64_t page) noexcept nogil:
    memcpy(copy, <const void *><uintptr_t>(addr + page * PAGE), PAGE)
