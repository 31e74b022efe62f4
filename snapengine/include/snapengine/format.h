/* Image format, version 1: the constants that writer and reader share. FORMAT.md defines them. */
#ifndef SNAPENGINE_FORMAT_H
#define SNAPENGINE_FORMAT_H

#include <stdint.h>

#define SNAP_PAGE_BYTES 4096u
#define SNAP_CHUNK_MAX_BYTES (4u << 20)  /* most raw bytes in one record's payload */
#define SNAP_META_MAX_BYTES (256u << 10) /* most bytes of one record's meta (page map, name) */

/* One page-map entry: page number | (pages - 1) << 40 | kind << 62. */
#define SNAP_ENTRY_PAGE_BITS 40
#define SNAP_ENTRY_COUNT_BITS 22
#define SNAP_ENTRY_MAX_PAGES (1u << SNAP_ENTRY_COUNT_BITS)

enum snap_entry_kind {
    SNAP_DATA = 0, /* the pages' bytes are in the payload, in order */
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

#endif
