/* Image format, version 1: constants and structs of writer and reader. FORMAT.md defines every field. */
#ifndef SNAPENGINE_FORMAT_H
#define SNAPENGINE_FORMAT_H

#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the structs below have the byte order of the file (little-endian); a big-endian host needs byte swaps"
#endif

#define SNAP_MAGIC "\x89SNPE\r\n\x1a"
#define SNAP_MAJOR 1u
#define SNAP_MINOR 0u
#define SNAP_FEATURES UINT64_C(0) /* feature bits that this version supports */

#define SNAP_PAGE_BYTES 4096u
#define SNAP_CHUNK_MAX_BYTES (4u << 20)  /* most raw bytes in one record's payload */
#define SNAP_META_MAX_BYTES (256u << 10) /* most bytes of one record's meta (page map, name) */
#define SNAP_PART_MAX_BYTES (1u << 20)   /* most raw bytes in one part of regions, index, vmstate */
#define SNAP_NAME_MAX_BYTES 4096u        /* most bytes of a name, in UTF-8 */
#define SNAP_ALIGN_BYTES 64              /* alignment of the payload of a large raw chunk in the file */

/* One page-map entry: page number | (pages - 1) << 40 | kind << 62. */
#define SNAP_ENTRY_PAGE_BITS 40
#define SNAP_ENTRY_COUNT_BITS 22
#define SNAP_ENTRY_MAX_PAGES (1u << SNAP_ENTRY_COUNT_BITS)
#define SNAP_PAGES_MAX (UINT64_C(1) << SNAP_ENTRY_PAGE_BITS)

enum snap_entry_kind {
    SNAP_DATA = 0, /* the payload holds the bytes of the pages, in order */
    SNAP_ZERO = 1, /* populated, all bytes zero */
    SNAP_HOLE = 2, /* not populated at T */
    SNAP_LOST = 3, /* discarded by the target before it was saved */
};

static inline uint64_t snap_entry(uint64_t page, uint64_t pages, uint64_t kind) {
    return page | (pages - 1) << SNAP_ENTRY_PAGE_BITS | kind << 62;
}
static inline uint64_t snap_entry_page(uint64_t entry) {
    return entry & ((UINT64_C(1) << SNAP_ENTRY_PAGE_BITS) - 1);
}
static inline uint64_t snap_entry_pages(uint64_t entry) {
    return ((entry >> SNAP_ENTRY_PAGE_BITS) & (SNAP_ENTRY_MAX_PAGES - 1)) + 1;
}
static inline unsigned snap_entry_kind(uint64_t entry) { return (unsigned)(entry >> 62); }

enum snap_encoding { SNAP_RAW = 0, SNAP_ZSTD = 1 };

#define SNAP_TAG(a, b, c, d) \
    ((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)
#define SNAP_REGN SNAP_TAG('R', 'E', 'G', 'N')
#define SNAP_CHNK SNAP_TAG('C', 'H', 'N', 'K')
#define SNAP_VMST SNAP_TAG('V', 'M', 'S', 'T')
#define SNAP_PADD SNAP_TAG('P', 'A', 'D', 'D')
#define SNAP_STAT SNAP_TAG('S', 'T', 'A', 'T')
#define SNAP_INDX SNAP_TAG('I', 'N', 'D', 'X')
#define SNAP_TRLR SNAP_TAG('T', 'R', 'L', 'R')

enum snap_flags {
    SNAP_LAST_PART = 1u,       /* REGN, VMST, INDX: no further part follows */
    SNAP_MAY_IGNORE = 1u << 15 /* a reader skips the record if it does not know the type */
};

struct snap_file_header {
    uint8_t magic[8];
    uint16_t major, minor;
    uint32_t header_bytes;
    uint64_t features;
    uint8_t image_id[16], parent_id[16];
    uint32_t reserved;
    uint32_t crc; /* of the bytes before it */
};

struct snap_record {
    uint32_t type;
    uint16_t encoding, flags;
    uint64_t stored_bytes, raw_bytes;
    uint32_t meta_bytes, arg;
    uint64_t seq;
    uint32_t payload_crc; /* of the payload as stored */
    uint32_t header_crc;  /* of the bytes before it, then of the meta */
};

struct snap_region { /* followed by name_bytes of UTF-8 */
    uint64_t addr, length, first_page;
    uint32_t page_size;
    uint16_t kind, name_bytes;
};

struct snap_index {
    uint64_t offset, record_bytes;
    uint64_t first_page, last_page; /* VMST: part number, raw bytes */
    uint32_t entries, type;         /* VMST: 0 entries; type is the record's */
};

struct snap_trailer {
    uint64_t regn_offset, stat_offset, indx_offset;
    uint64_t records, chunks, vmstate_parts, image_bytes;
    uint8_t image_id[16];
};

_Static_assert(sizeof(struct snap_file_header) == 64, "file header");
_Static_assert(sizeof(struct snap_record) == 48, "record header");
_Static_assert(sizeof(struct snap_region) == 32, "region");
_Static_assert(sizeof(struct snap_index) == 40, "index entry");
_Static_assert(sizeof(struct snap_trailer) == 72, "trailer");

#endif
