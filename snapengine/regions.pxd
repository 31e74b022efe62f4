from libc.stdint cimport uint64_t


cdef class Region:                  # as its maker gave it: numbers are checked by who uses them
    cdef readonly str name
    cdef readonly object addr
    cdef readonly object length
    cdef readonly object page_size
    cdef readonly str kind
    cdef readonly object memfd
    cdef readonly object memfd_offset
    cdef readonly object zero_inode


cdef class RegionPlan:              # how one region is tracked and read: see region_t in session.pxd
    cdef public Region region
    cdef public uint64_t addr
    cdef public uint64_t pages
    cdef public uint64_t first_page
    cdef public uint64_t unit_pages
    cdef public uint64_t track_start
    cdef public uint64_t track_end
    cdef public uint64_t source
    cdef public int file
    cdef public uint64_t file_offset
    cdef public str reading
    cdef public str presence
    cdef public bint shared
    cdef public bint missing
    cdef public bint sparse
    cdef public bint check
    cdef public bint own
    cdef public uint64_t shadow
    cdef public bint alone_before
    cdef public bint alone_after
    cdef public bint follows
    cdef public bint keep_huge


cpdef bint is_shared(str kind)      # whether memory of this kind may be mapped elsewhere, too
