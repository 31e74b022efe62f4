# extern-only: no matching .pyx
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "snapengine/format.h" nogil:
    const uint32_t SNAP_PAGE_BYTES
    const uint32_t SNAP_CHUNK_MAX_BYTES
    const uint32_t SNAP_META_MAX_BYTES
    const uint64_t SNAP_ENTRY_MAX_PAGES
    enum:
        SNAP_DATA
        SNAP_ZERO
        SNAP_HOLE
        SNAP_LOST
        SNAP_RAW
        SNAP_ZSTD
    uint64_t snap_entry(uint64_t page, uint64_t pages, uint64_t kind)
    uint64_t snap_entry_page(uint64_t entry)
    uint64_t snap_entry_pages(uint64_t entry)
    unsigned snap_entry_kind(uint64_t entry)
