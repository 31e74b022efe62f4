"""Regions of memory, their kinds and their plans. The classes are C's: a process may have 65 000 of each, and
making one takes 0.1 µs.

No cycle can go through them, so the garbage collector need not look at them either.
"""

cimport cython
from libc.stdint cimport uint64_t

PAGE_BYTES = 4096
KINDS = ("anon", "shared", "hugetlb", "hugetlb-shared")


def kind_of(page_bytes, shared):
    """Which of `KINDS` a mapping is, by the size of its pages and whether it is shared."""
    if page_bytes > PAGE_BYTES:
        return "hugetlb-shared" if shared else "hugetlb"
    return "shared" if shared else "anon"


cpdef bint is_shared(str kind):
    """Whether memory of this kind may be mapped elsewhere, too."""
    return kind == "shared" or kind == "hugetlb-shared"


@cython.no_gc
@cython.dataclasses.dataclass(frozen=True)
cdef class Region:
    """One run of tracked memory.

    ``addr`` and ``length`` are bytes in the target's address space; a region of this process's own
    buffers may begin and end inside a page. ``page_size`` is the size of the mapping's pages (4096, or
    the hugetlb page size). ``kind`` is one of `snapengine.regions.KINDS`. ``memfd`` is a descriptor of the
    memory that this process holds, or -1; ``memfd_offset`` is where the region begins in it. ``zero_inode``:
    of a private mapping of /dev/zero, which the kernel treats as anonymous, the inode that it still shows;
    else 0.
    """

    name: str
    addr: object
    length: object
    page_size: object = 4096
    kind: str = "anon"
    memfd: object = -1
    memfd_offset: object = 0
    zero_inode: object = 0


@cython.no_gc
@cython.dataclasses.dataclass
cdef class RegionPlan:
    """How one region is tracked and read. See `snapengine.engine.session.region_t` for the fields."""

    region: Region
    addr: uint64_t
    pages: uint64_t
    first_page: uint64_t
    unit_pages: uint64_t
    track_start: uint64_t
    track_end: uint64_t
    source: uint64_t = 0
    file: cython.int = -1
    file_offset: uint64_t = 0
    reading: str = "memory"
    presence: str = "bits"
    shared: cython.bint = False
    missing: cython.bint = False
    sparse: cython.bint = False
    check: cython.bint = False
    own: cython.bint = False
    shadow: uint64_t = 0
    alone_before: cython.bint = False
    alone_after: cython.bint = False
    follows: cython.bint = False
    keep_huge: cython.bint = False


def any_shared(list regions not None):
    """Whether any of them is memory that other mappings may hold, too."""
    cdef Region region
    for region in regions:
        if is_shared(region.kind):
            return True
    return False


def total_bytes(list regions not None):
    """Bytes of all of them."""
    cdef Region region
    total = 0
    for region in regions:
        total += region.length
    return total
