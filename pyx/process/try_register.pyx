"""Register the selected memory of an attached process, to find out what the kernel refuses to track.

The memory stays registered: unregistering would walk the page tables, and nothing is protected yet.
"""

from libc.errno cimport EBUSY, EINVAL, EPERM
from libc.stdint cimport uint64_t

from snapengine.kernel.linux cimport UFFDIO_REGISTER_MODE_WP
from snapengine.kernel.procmaps_line cimport Mapping
from snapengine.kernel.procmap_query cimport next_vma, vma_t
from snapengine.regions cimport Region
from snapengine.kernel.uffd cimport Uffd, uffd_register


cdef int _refusal(int fd, int maps, uint64_t start, uint64_t end) noexcept nogil:
    cdef vma_t vma
    cdef int err = -1
    if maps >= 0:
        err = next_vma(maps, start, &vma)
        if not err and vma.start <= start:
            start = vma.start
        if err or vma.end < end:            # several mappings
            err = next_vma(maps, end - 1, &vma)
        if not err and vma.start < end:
            end = vma.end
    err = uffd_register(fd, start, end - start, UFFDIO_REGISTER_MODE_WP)
    return err if err in (EBUSY, EINVAL, EPERM) else 0


def refusal(Uffd uffd not None, int maps, uint64_t start, uint64_t end):
    """The errno with which the kernel refuses to track the range; 0: it accepts, or nothing is mapped there
    any more. A mapping that has grown meanwhile is registered as a whole: registering a part would split it.
    ``maps`` is an open /proc/PID/maps; -1: no mapping can have grown."""
    return _refusal(uffd.fd, maps, start, end)


cdef Py_ssize_t _run_end(list regions, Py_ssize_t first, list mappings, Py_ssize_t *at) except -1:
    """The end of the run of regions, from number `first` on, without other mappings between them. `at` is the
    number of a mapping before the run; it is advanced."""
    cdef Py_ssize_t last = first
    cdef Region region
    cdef uint64_t end
    while True:
        region = regions[last]
        end = region.addr + region.length
        last += 1
        while at[0] < len(mappings) and (<Mapping>mappings[at[0]]).start < end:
            at[0] += 1
        if last == len(regions) or not 0 < at[0] < len(mappings):
            return last
        if (<Mapping>mappings[at[0] - 1]).end != end \
                or (<Mapping>mappings[at[0]]).start != <uint64_t>(<Region>regions[last]).addr:
            return last


def refused_regions(Uffd uffd not None, int maps, list regions not None, list mappings=None):
    """Register the regions, and return those that the kernel refuses. ``mappings``: all mappings of a process
    that has been stopped since they were listed, so that one call can cover many regions; None: it runs."""
    cdef Py_ssize_t number = 0
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t i, run_end
    cdef Region region, last
    cdef uint64_t start, end
    cdef list refused = []
    while number < len(regions):
        run_end = number + 1 if mappings is None else _run_end(regions, number, mappings, &at)
        region, last = regions[number], regions[run_end - 1]
        start, end = region.addr, last.addr + last.length
        # The kernel refuses a call as a whole if it refuses any part.
        if run_end > number + 1 and uffd_register(uffd.fd, start, end - start, UFFDIO_REGISTER_MODE_WP):
            for i in range(number, run_end):
                region = regions[i]
                if _refusal(uffd.fd, -1, region.addr, region.addr + region.length):
                    refused.append(region)
        elif run_end == number + 1 and _refusal(uffd.fd, -1 if mappings is not None else maps, start, end):
            refused.append(region)
        number = run_end
    return refused
