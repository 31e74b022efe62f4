# extern-only: no matching .pyx
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "snapengine/format.h" nogil:
    const char *SNAP_MAGIC
    const uint16_t SNAP_MAJOR
    const uint16_t SNAP_MINOR
    const uint64_t SNAP_FEATURES
    const uint32_t SNAP_PAGE_BYTES
    const uint32_t SNAP_CHUNK_MAX_BYTES
    const uint32_t SNAP_META_MAX_BYTES
    const uint32_t SNAP_PART_MAX_BYTES
    const uint32_t SNAP_NAME_MAX_BYTES
    const uint64_t SNAP_ENTRY_MAX_PAGES
    const uint64_t SNAP_PAGES_MAX
    const uint32_t SNAP_REGN
    const uint32_t SNAP_CHNK
    const uint32_t SNAP_VMST
    const uint32_t SNAP_PADD
    const uint32_t SNAP_STAT
    const uint32_t SNAP_INDX
    const uint32_t SNAP_TRLR
    enum:
        SNAP_ALIGN_BYTES
        SNAP_DATA
        SNAP_ZERO
        SNAP_HOLE
        SNAP_LOST
        SNAP_RAW
        SNAP_ZSTD
        SNAP_LAST_PART
        SNAP_MAY_IGNORE
    uint64_t snap_entry(uint64_t page, uint64_t pages, uint64_t kind)
    uint64_t snap_entry_page(uint64_t entry)
    uint64_t snap_entry_pages(uint64_t entry)
    unsigned snap_entry_kind(uint64_t entry)

    struct snap_file_header:
        uint8_t magic[8]
        uint16_t major
        uint16_t minor
        uint32_t header_bytes
        uint64_t features
        uint8_t image_id[16]
        uint8_t parent_id[16]
        uint32_t reserved
        uint32_t crc

    struct snap_record:
        uint32_t type
        uint16_t encoding
        uint16_t flags
        uint64_t stored_bytes
        uint64_t raw_bytes
        uint32_t meta_bytes
        uint32_t arg
        uint64_t seq
        uint32_t payload_crc
        uint32_t header_crc

    struct snap_region:
        uint64_t addr
        uint64_t length
        uint64_t first_page
        uint32_t page_size
        uint16_t kind
        uint16_t name_bytes

    struct snap_index:
        uint64_t offset
        uint64_t record_bytes
        uint64_t first_page
        uint64_t last_page
        uint32_t entries
        uint32_t type

    struct snap_trailer:
        uint64_t regn_offset
        uint64_t stat_offset
        uint64_t indx_offset
        uint64_t records
        uint64_t chunks
        uint64_t vmstate_parts
        uint64_t image_bytes
        uint8_t image_id[16]
